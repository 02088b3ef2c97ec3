"""The classes of torchvision that are replaced."""

from convblocks.accelerate.gates import squeeze_excite
from convblocks.accelerate.shuffles import shuffle_unit

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
    shuffle_unit("FastInvertedResidual", "torchvision.models.shufflenetv2.InvertedResidual"),
)
