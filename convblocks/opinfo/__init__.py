"""The records of all operations."""

from collections import ChainMap

from convblocks.opinfo import (
    apply_gates,
    cbam,
    channel_attention,
    channel_pool,
    channel_shuffle,
    concat_shuffle,
    dense_conv2d,
    depthwise_conv2d,
    eca,
    global_context,
    partial_conv2d,
    scale_shift_act,
    scse,
    simam,
    squeeze_excite,
)
from convblocks.opinfo.record import DTYPES, LAYOUTS, BadInput, OpInfo, Options, Sample, Size

_MODULES = (
    squeeze_excite,
    eca,
    simam,
    channel_shuffle,
    concat_shuffle,
    dense_conv2d,
    depthwise_conv2d,
    global_context,
    partial_conv2d,
    scale_shift_act,
    channel_attention,
    channel_pool,
    apply_gates,
    scse,
)
OPS: dict[str, OpInfo] = {module.INFO.name: module.INFO for module in _MODULES}
COMPOSED = {"cbam": cbam.INFO}  # of several operations: timed, and as accurate, but none of the dispatcher
TIMED: ChainMap[str, OpInfo] = ChainMap(COMPOSED, OPS)

__all__ = ["COMPOSED", "DTYPES", "LAYOUTS", "OPS", "TIMED", "BadInput", "OpInfo", "Options", "Sample", "Size"]
