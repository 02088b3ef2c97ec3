"""The two passes that the channel gates share: sums over the pixels of each plane, and the scaling of the planes.

Where there are few planes each is summed in parts. The sums lie in one tensor (N, 4, SPLITS, C): of x, the maximum of
x, of grad * x, and how many pixels have the maximum.
Whoever reads them adds up the parts, in order: no atomics, the same result on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import (
    ENOUGH,
    Maps,
    Tile,
    backwards,
    dense_offsets,
    inside,
    kernel,
    load,
    locate,
    offsets,
    store,
)

MAX_SPLITS = 16
# Of a tile in a loop over tiles, 8 for each thread: LLVM in triton 3.8 crashes on some sums of 16 (sm_86 to sm_90).
WALK_ELEMENTS = 2048
SUM, MAX, DOT, TIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def splits_of(maps: Maps, tile: Tile) -> int:
    """Into how many parts, of four tiles at least, each plane is cut to keep a GPU busy."""
    splits = 1
    while splits < MAX_SPLITS and 8 * splits <= tile.p_blocks and maps.n * tile.c_blocks * splits < ENOUGH:
        splits *= 2
    return splits


def pool(maps: Maps, add_max: bool, ties: bool = False) -> tuple[Tensor, int]:
    """The sums over x, or over x and grad where the maps are those two, and the number of parts. Ties are counted with
    a grad, or where they are asked for."""
    tile = maps.tile(WALK_ELEMENTS, a_thread=8)
    splits = splits_of(maps, tile)
    sums = maps.sums(maps.n, 4, splits, maps.c)
    _pool[(maps.n * tile.c_blocks * splits,)](
        *maps.pair(),
        sums,
        maps.c,
        maps.hw,
        triton.cdiv(tile.p_blocks, splits),
        SPLITS=splits,
        ADD_MAX=add_max,
        COUNT_TIES=ties or len(maps.arguments) > 3,
        **tile.constants,
    )
    return sums, splits


@kernel
def _pool(
    x, x_batch, x_stride, g, g_batch, g_stride, sums, C, HW, count,
    SPLITS: tl.constexpr, ADD_MAX: tl.constexpr, COUNT_TIES: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: ``count`` tiles of a block of planes."""
    n, c, part = locate(tl.program_id(0), C, SPLITS, CHANNELS_LAST, BLOCK_C)
    dtype: tl.constexpr = sums.dtype.element_ty
    total = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    dot = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    ties = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    highest = tl.full((BLOCK_C, BLOCK_P), float("-inf"), dtype)
    first = part * count * BLOCK_P
    for p0 in range(first, tl.minimum(first + count * BLOCK_P, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        total += value
        if g is not None:
            dot += value * load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        if ADD_MAX:
            if COUNT_TIES:
                ties = tl.where(mask & (value > highest), 1.0, ties + tl.where(mask & (value == highest), 1.0, 0.0))
            highest = tl.where(mask & (value > highest), value, highest)

    at = sums + slot(n, SUM, part, c, C, SPLITS)
    step = SPLITS * C.to(tl.int64)
    store(at, tl.sum(total, 1, keep_dims=True), c < C)
    if g is not None:
        store(at + DOT * step, tl.sum(dot, 1, keep_dims=True), c < C)
    if ADD_MAX:
        peak = tl.max(highest, 1, keep_dims=True)
        store(at + MAX * step, peak, c < C)
        if COUNT_TIES:
            store(at + TIES * step, tl.sum(tl.where(highest == peak, ties, 0.0), 1, keep_dims=True), c < C)


def scale(maps: Maps, gates: Tensor, y: Tensor) -> None:
    """y = x * gate of the channel, for gates (N, C)."""
    tile = maps.tile(4096)
    programs = (maps.n * tile.c_blocks * tile.p_blocks,)
    _scale[programs](*maps.arguments, gates, y, maps.c, maps.hw, tile.p_blocks, **tile.constants)


@kernel
def _scale(
    x, x_batch, x_stride, gates, y, C, HW, blocks,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile."""
    n, c, block = locate(backwards(), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    gate = load(gates + n * C + c, c < C)
    store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), value * gate, mask)


@triton.jit
def parts(sums, n, kind, c, mask, C, SPLITS: tl.constexpr):
    """All parts of one kind along axis 1, which has size 1 in c: of channels (c, 1) or samples x channels (n, 1, c)."""
    if len(c.shape) == 2:
        part = tl.arange(0, SPLITS)[None, :]
    else:
        part = tl.arange(0, SPLITS)[None, :, None]
    return load(sums + slot(n, kind, part, c, C, SPLITS), mask)


@triton.jit
def slot(n, kind, part, c, C, SPLITS: tl.constexpr):
    return ((n * 4 + kind) * SPLITS + part) * C + c


@triton.jit
def summed(sums, n, kind, c, mask, C, SPLITS: tl.constexpr):
    return tl.sum(parts(sums, n, kind, c, mask, C, SPLITS), 1, keep_dims=True)


@triton.jit
def squeezed(sums, n, c, mask, C, HW, SPLITS: tl.constexpr, ADD_MAX: tl.constexpr):
    """The mean of the plane, or half of it and half of the maximum."""
    total = summed(sums, n, SUM, c, mask, C, SPLITS)
    mean = total / HW.to(total.dtype)
    if ADD_MAX:
        mean = 0.5 * mean + 0.5 * tl.max(parts(sums, n, MAX, c, mask, C, SPLITS), 1, keep_dims=True)
    return mean
