"""The classes of timm that are replaced."""

from convblocks.accelerate.convolutions import depthwise, partial_conv
from convblocks.accelerate.gates import cbam, eca, effective_squeeze_excite, global_context, squeeze_excite

RULES = (
    squeeze_excite("FastSEModule", "timm.layers.squeeze_excite.SEModule", "fc1", "act", "fc2", "gate", norm="bn"),
    squeeze_excite(
        "FastSqueezeExcite",
        "timm.models._efficientnet_blocks.SqueezeExcite",
        "conv_reduce",
        "act1",
        "conv_expand",
        "gate",
    ),
    squeeze_excite("FastSenetSEModule", "timm.models.senet.SEModule", "fc1", "relu", "fc2", "sigmoid"),
    effective_squeeze_excite("FastEffectiveSEModule", "timm.layers.squeeze_excite.EffectiveSEModule", "fc", "gate"),
    effective_squeeze_excite("FastEseModule", "timm.models.hgnet.EseModule", "conv", "sigmoid"),
    eca("FastEcaModule", "timm.layers.eca.EcaModule", "gate", "zeros"),
    global_context("FastGlobalContext", "timm.layers.global_context.GlobalContext"),
    depthwise("FastConv2dSame", "timm.layers.conv2d_same.Conv2dSame", same=True),
    partial_conv("FastPartialConv3", "timm.models.fasternet.Partial_conv3", "forward_slicing", "forward_split_cat"),
    eca("FastCecaModule", "timm.layers.eca.CecaModule", "gate", "circular"),
    cbam("FastCbamModule", "timm.layers.cbam.CbamModule", light=False),
    cbam("FastLightCbamModule", "timm.layers.cbam.LightCbamModule", light=True),
)
