"""Blocks as modules: parameters and a call to an operation."""

from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.cbam import CBAM, ChannelAttention, SpatialAttention
from convblocks.blocks.channel_shuffle import ChannelShuffle
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import convert_state_dict
from convblocks.blocks.darknet import DarknetResidual
from convblocks.blocks.densenet import DenseBlock, DenseLayer, Transition
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.depthwise_separable_conv import DepthwiseSeparableConv
from convblocks.blocks.eca import ECA
from convblocks.blocks.fasternet import FasterNetBlock
from convblocks.blocks.parnet import ParNetBlock, ParNetFusion
from convblocks.blocks.partial_conv import PartialConv
from convblocks.blocks.res2net import Res2NetBottleneck
from convblocks.blocks.resnet import BasicBlock, Bottleneck
from convblocks.blocks.scse import SCSE, ChannelSE, SpatialSE
from convblocks.blocks.shufflenet import ShuffleNetV1Unit, ShuffleNetV2Unit
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite

__all__ = [
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
    "DarknetResidual",
    "DenseBlock",
    "DenseLayer",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv",
    "EffectiveSqueezeExcite",
    "FasterNetBlock",
    "ParNetBlock",
    "ParNetFusion",
    "PartialConv",
    "Res2NetBottleneck",
    "ShuffleNetV1Unit",
    "ShuffleNetV2Unit",
    "SimAM",
    "SpatialAttention",
    "SpatialSE",
    "SqueezeExcite",
    "Transition",
    "convert_state_dict",
]
