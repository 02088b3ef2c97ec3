"""The records of all operations."""

from convblocks.opinfo import (
    channel_shuffle,
    concat_shuffle,
    depthwise_conv2d,
    eca,
    global_context,
    partial_conv2d,
    scale_shift_act,
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
    depthwise_conv2d,
    global_context,
    partial_conv2d,
    scale_shift_act,
)
OPS: dict[str, OpInfo] = {module.INFO.name: module.INFO for module in _MODULES}

__all__ = ["DTYPES", "LAYOUTS", "OPS", "BadInput", "OpInfo", "Options", "Sample", "Size"]
