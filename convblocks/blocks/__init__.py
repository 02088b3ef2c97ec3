"""Blocks as modules: parameters and a call to an operation."""

from convblocks.blocks.aspp import ASPP
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
from convblocks.blocks.fire import Fire
from convblocks.blocks.ghost import GhostBottleneck, GhostModule
from convblocks.blocks.global_context import GlobalContext
from convblocks.blocks.inception import (
    InceptionBranches,
    InceptionV1Module,
    InceptionV3A,
    InceptionV3B,
    InceptionV3C,
    InceptionV3D,
    InceptionV3E,
)
from convblocks.blocks.inception_resnet import (
    InceptionResidual,
    InceptionResNetA,
    InceptionResNetB,
    InceptionResNetC,
    InceptionResNetReductionB,
)
from convblocks.blocks.inception_v4 import (
    InceptionReductionA,
    InceptionV4A,
    InceptionV4B,
    InceptionV4C,
    InceptionV4ReductionB,
)
from convblocks.blocks.inverted_residual import FusedMBConv, InvertedResidual, MBConv
from convblocks.blocks.parnet import ParNetBlock, ParNetFusion
from convblocks.blocks.partial_conv import PartialConv
from convblocks.blocks.res2net import Res2NetBottleneck
from convblocks.blocks.resnet import BasicBlock, Bottleneck
from convblocks.blocks.scse import SCSE, ChannelSE, SpatialSE
from convblocks.blocks.shufflenet import ShuffleNetV1Unit, ShuffleNetV2Unit
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite
from convblocks.blocks.sync_batch_norm import SyncBatchNorm2d, SyncBatchNormAct2d, convert_sync_batchnorm
from convblocks.blocks.unet import DoubleConv, UNetDown, UNetUp
from convblocks.blocks.vgg import VGGBlock
from convblocks.blocks.xception import XceptionBlock

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
    "DarknetResidual",
    "DenseBlock",
    "DenseLayer",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv",
    "DoubleConv",
    "EffectiveSqueezeExcite",
    "FasterNetBlock",
    "Fire",
    "FusedMBConv",
    "GhostBottleneck",
    "GhostModule",
    "GlobalContext",
    "InceptionBranches",
    "InceptionReductionA",
    "InceptionResNetA",
    "InceptionResNetB",
    "InceptionResNetC",
    "InceptionResNetReductionB",
    "InceptionResidual",
    "InceptionV1Module",
    "InceptionV3A",
    "InceptionV3B",
    "InceptionV3C",
    "InceptionV3D",
    "InceptionV3E",
    "InceptionV4A",
    "InceptionV4B",
    "InceptionV4C",
    "InceptionV4ReductionB",
    "InvertedResidual",
    "MBConv",
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
    "SyncBatchNorm2d",
    "SyncBatchNormAct2d",
    "Transition",
    "UNetDown",
    "UNetUp",
    "VGGBlock",
    "XceptionBlock",
    "convert_state_dict",
    "convert_sync_batchnorm",
]
