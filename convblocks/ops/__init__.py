"""The operations as functions: forward and backward on every backend."""

from convblocks.ops.eca import eca
from convblocks.ops.simam import simam
from convblocks.ops.squeeze_excite import squeeze_excite

__all__ = ["eca", "simam", "squeeze_excite"]
