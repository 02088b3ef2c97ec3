"""Blocks as modules: parameters and a call to an operation."""

from convblocks.blocks.cbam import CBAM, ChannelAttention, SpatialAttention
from convblocks.blocks.channel_shuffle import ChannelShuffle
from convblocks.blocks.convert import convert_state_dict
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.depthwise_separable_conv import DepthwiseSeparableConv
from convblocks.blocks.eca import ECA
from convblocks.blocks.fasternet import FasterNetBlock
from convblocks.blocks.global_context import GlobalContext
from convblocks.blocks.partial_conv import PartialConv
from convblocks.blocks.scse import SCSE, ChannelSE, SpatialSE
from convblocks.blocks.shufflenet import ShuffleNetV1Unit, ShuffleNetV2Unit
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite

__all__ = [
    "CBAM",
    "ECA",
    "SCSE",
    "ChannelAttention",
    "ChannelSE",
    "ChannelShuffle",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv",
    "EffectiveSqueezeExcite",
    "FasterNetBlock",
    "GlobalContext",
    "PartialConv",
    "ShuffleNetV1Unit",
    "ShuffleNetV2Unit",
    "SimAM",
    "SpatialAttention",
    "SpatialSE",
    "SqueezeExcite",
    "convert_state_dict",
]
