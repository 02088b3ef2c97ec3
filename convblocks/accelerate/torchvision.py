"""The classes of torchvision that are replaced."""

from convblocks.accelerate.gates import squeeze_excite

RULES = (
    squeeze_excite(
        "FastSqueezeExcitation",
        "torchvision.ops.misc.SqueezeExcitation",
        "fc1",
        "activation",
        "fc2",
        "scale_activation",
        pool="avgpool",
    ),
)
