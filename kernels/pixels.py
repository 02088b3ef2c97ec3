"""What the operations with a number for each pixel share: programs that go through the channels of a block of pixels,
and the sums that they leave in parts. Whoever reads those adds them up, in order: no atomics, the same result on every
run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import ENOUGH, LINE, Maps, Tile, kernel, load, power_of_2, store
from convblocks.kernels.pool import WALK_ELEMENTS

PARTS = tl.constexpr(1024)  # numbers that a program adds up


class Walk(NamedTuple):
    """Tiles whose programs each go through ``count`` of them, one after the other along the channels."""

    tile: Tile
    count: int
    groups: int  # programs along the channels
    programs: int


def walk(maps: Maps, split: bool) -> Walk:
    """Through all channels; or, with ``split``, through some where few blocks of pixels would not keep a GPU busy."""
    channels, pixels = power_of_2(maps.c), power_of_2(maps.hw)
    wide = LINE // maps.itemsize
    block_p = min(
        pixels, 4 * max(1, WALK_ELEMENTS // (4 * min(channels, 2 * wide))) if maps.channels_last else 4 * wide
    )
    while block_p > (16 if maps.channels_last else wide) and maps.n * triton.cdiv(maps.hw, block_p) < ENOUGH:
        block_p //= 2
    tile = maps.tile_of(min(channels, max(1, WALK_ELEMENTS // block_p)), block_p, a_thread=8)
    count = tile.c_blocks
    while split and count > 1 and maps.n * tile.p_blocks * triton.cdiv(tile.c_blocks, count) < ENOUGH:
        count = triton.cdiv(count, 2)
    groups = triton.cdiv(tile.c_blocks, count)
    return Walk(tile, count, groups, maps.n * tile.p_blocks * groups)


@triton.jit
def place(blocks, groups, BLOCK_P: tl.constexpr):
    """Sample, block of pixels, its pixels (a row), and the group of channels of this program."""
    group = tl.program_id(0) % groups
    rest = tl.program_id(0) // groups
    block = (rest % blocks).to(tl.int64)
    return (rest // blocks).to(tl.int64), block, block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :], group.to(tl.int64)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """out[n, i] = the sum over k of parts[n, k, i], for a dense ``out``."""
    n, count, size = parts.shape
    if out.numel():
        _add_parts[(n, triton.cdiv(size, PARTS.value))](parts, out, count, size)


@kernel
def _add_parts(parts, out, count, width):
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    total = tl.zeros((PARTS,), parts.dtype.element_ty)
    for k in range(count):
        total += load(parts + (n * count + k) * width + i, i < width)
    store(out + n * width + i, total, i < width)
