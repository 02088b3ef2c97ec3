"""The classes of segmentation_models_pytorch that are replaced; most of its encoders are timm's own."""

from convblocks.accelerate.gates import scse, squeeze_excite

RULES = (
    squeeze_excite(
        "FastSmpSEModule",
        "segmentation_models_pytorch.encoders._senet.SEModule",
        "fc1",
        "relu",
        "fc2",
        "sigmoid",
        pool="avg_pool",
    ),
    scse("FastSCSEModule", "segmentation_models_pytorch.base.modules.SCSEModule"),
)
