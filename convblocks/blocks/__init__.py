"""Blocks as modules: parameters and a call to an operation."""

from convblocks.blocks.aspp import ASPP
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.cbam import CBAM, ChannelAttention, SpatialAttention
from convblocks.blocks.channel_shuffle import ChannelShuffle
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import convert_state_dict
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.depthwise_separable_conv import DepthwiseSeparableConv
from convblocks.blocks.eca import ECA
from convblocks.blocks.fasternet import FasterNetBlock
from convblocks.blocks.fire import Fire
from convblocks.blocks.ghost import GhostBottleneck, GhostModule
from convblocks.blocks.partial_conv import PartialConv
from convblocks.blocks.resnet import BasicBlock, Bottleneck
from convblocks.blocks.scse import SCSE, ChannelSE, SpatialSE
from convblocks.blocks.shufflenet import ShuffleNetV1Unit, ShuffleNetV2Unit
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite
from convblocks.blocks.unet import DoubleConv, UNetDown, UNetUp

__all__ = [
    "ASPP",
    "CBAM",
    "ECA",
    "SCSE",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ChannelAttention",
    "ChannelSE",
    "ChannelShuffle",
    "ConvNormAct",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv",
    "DoubleConv",
    "EffectiveSqueezeExcite",
    "FasterNetBlock",
    "Fire",
    "GhostBottleneck",
    "GhostModule",
    "PartialConv",
    "ShuffleNetV1Unit",
    "ShuffleNetV2Unit",
    "SimAM",
    "SpatialAttention",
    "SpatialSE",
    "SqueezeExcite",
    "UNetDown",
    "UNetUp",
    "convert_state_dict",
]
