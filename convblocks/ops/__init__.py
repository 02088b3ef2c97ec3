"""The operations as functions: forward and backward on every backend."""

from convblocks.ops.apply_gates import apply_gates
from convblocks.ops.channel_attention import channel_attention
from convblocks.ops.channel_pool import channel_pool
from convblocks.ops.channel_shuffle import channel_shuffle
from convblocks.ops.concat_shuffle import concat_shuffle
from convblocks.ops.dense_conv2d import dense_conv2d
from convblocks.ops.depthwise_conv2d import depthwise_conv2d
from convblocks.ops.eca import eca
from convblocks.ops.global_context import global_context
from convblocks.ops.partial_conv2d import partial_conv2d
from convblocks.ops.scale_shift_act import scale_shift_act
from convblocks.ops.scse import scse
from convblocks.ops.simam import simam
from convblocks.ops.spatial_attention import spatial_attention
from convblocks.ops.squeeze_excite import squeeze_excite

__all__ = [
    "apply_gates",
    "channel_attention",
    "channel_pool",
    "channel_shuffle",
    "concat_shuffle",
    "dense_conv2d",
    "depthwise_conv2d",
    "eca",
    "global_context",
    "partial_conv2d",
    "scale_shift_act",
    "scse",
    "simam",
    "spatial_attention",
    "squeeze_excite",
]
