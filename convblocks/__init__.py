"""Fused kernels for the blocks of convolutional networks: drop-in, differentiable, on CPUs and NVIDIA GPUs."""

from pathlib import Path as _Path

_root = _Path(__file__).parent.parent
if not (_Path(__file__).parent / "kernels").is_dir() and (_root / "kernels" / "simam.py").is_file():
    __path__.append(str(_root))  # a checkout, or an editable install: kernels/ stands beside the package

import torch as _torch  # noqa: E402, F401  (the compiled part links to its libraries)

from convblocks import backends, ops  # noqa: E402
from convblocks.accelerate import accelerate, is_accelerated, revert  # noqa: E402  (the function hides its package)
from convblocks.backends import use_backend, why_not  # noqa: E402
from convblocks.blocks import (  # noqa: E402
    CBAM,
    ECA,
    SCSE,
    ChannelAttention,
    ChannelSE,
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv,
    EffectiveSqueezeExcite,
    FasterNetBlock,
    GlobalContext,
    PartialConv,
    ShuffleNetV1Unit,
    ShuffleNetV2Unit,
    SimAM,
    SpatialAttention,
    SpatialSE,
    SqueezeExcite,
    convert_state_dict,
)

__version__ = "0.1.0"
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
    "accelerate",
    "backends",
    "convert_state_dict",
    "is_accelerated",
    "ops",
    "revert",
    "use_backend",
    "why_not",
]

backends.select_from_environment()
