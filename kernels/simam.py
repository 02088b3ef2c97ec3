"""SimAM: y = x * s with s = sigmoid(u + 1/2), u = r d^2, d = x - mean, r = 1 / (4 (var + lambda)), over each plane.

Backward, with t = grad * x * s * (1 - s) and n = HW - 1:
grad_x = grad * s + 2 r (t * d - 4 / n * sum(t * u) * d - sum(t * d) / HW).

A block of planes that fits the registers of one program is read once (`_tile`). Bigger planes are walked once for each
sum and once to write (`_walk`): by one program where they then come from its cache, else in a launch for each walk,
whose programs share the planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import (
    ENOUGH,
    SECTOR,
    Maps,
    backwards,
    dense_offsets,
    inside,
    kernel,
    load,
    locate,
    offsets,
    power_of_2,
    store,
)
from convblocks.kernels.pool import WALK_ELEMENTS, parts, slot, splits_of, summed

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 16384, 8192  # of a tile that fits the registers
CACHED_BYTES = 262144  # of the maps that one program walks
MEAN, SQUARES, TU, TD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def simam(x: Tensor, e_lambda: float) -> Tensor:
    return _run(Maps(x), e_lambda, FORWARD_ELEMENTS, ["moments", "write"])


def simam_backward(grad: Tensor, x: Tensor, e_lambda: float) -> Tensor:
    return _run(Maps(x, grad), e_lambda, BACKWARD_ELEMENTS, ["moments", "sums", "write"])


def _run(maps: Maps, e_lambda: float, elements: int, steps: list[str]) -> Tensor:
    out = maps.output()
    if out.numel() == 0:
        return out
    e_lambda = max(e_lambda, torch.finfo(maps.accumulator).tiny)  # or 1 / lambda is not finite
    narrow = min(power_of_2(maps.c), SECTOR // maps.itemsize) if maps.channels_last else 1
    plane = power_of_2(maps.hw)
    with torch.cuda.device_of(out):
        if narrow * plane <= elements:
            block_c = max(narrow, min(power_of_2(maps.c), 4096 // plane))
            while block_c > narrow and maps.programs(block_c, plane) < ENOUGH:
                block_c //= 2
            tile = maps.tile_of(block_c, plane)
            _tile[(maps.n * tile.c_blocks,)](*maps.pair(), out, maps.c, maps.hw, LAMBDA=e_lambda, **tile.constants)
            return out

        tile, splits, sums = maps.tile_of(narrow, WALK_ELEMENTS // narrow, a_thread=8), 1, None
        if maps.n * tile.c_blocks >= ENOUGH // 4 and maps.read_bytes(narrow) <= CACHED_BYTES:
            steps = ["all"]
        else:
            tile = maps.tile(WALK_ELEMENTS, a_thread=8)
            splits = splits_of(maps, tile)
            sums = maps.sums(maps.n, 4, splits, maps.c)
        for step in steps:
            _walk[(maps.n * tile.c_blocks * splits,)](
                *maps.pair(),
                out,
                sums,
                maps.c,
                maps.hw,
                triton.cdiv(tile.p_blocks, splits),
                LAMBDA=e_lambda,
                STEP=step,
                SPLITS=splits,
                **tile.constants,
            )
    return out


@triton.jit
def _backward_terms(x, g, d, r):
    """grad * s, t and u."""
    u = d * d * r
    s = tl.sigmoid(u + 0.5)
    return g * s, g * x * s * (1 - s), u


@triton.jit
def _grad_x(gs, t, d, r, tu, td, HW):
    pixels = HW.to(r.dtype)
    return gs + t * d * (2 * r) - d * (8 / (pixels - 1) * tu * r) - 2 / pixels * td * r


@kernel
def _tile(
    x, x_batch, x_stride, g, g_batch, g_stride, out, C, HW, LAMBDA: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a block of whole planes."""
    n, c, _ = locate(tl.program_id(0), C, 1, CHANNELS_LAST, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    pixels = HW.to(value.dtype)
    mean = tl.sum(value, 1, keep_dims=True) / pixels
    value = tl.where(mask, value, mean)
    d = value - mean
    r = 1 / (4 * (tl.sum(d * d, 1, keep_dims=True) / (pixels - 1) + LAMBDA))
    if g is None:
        result = value * tl.sigmoid(d * d * r + 0.5)
    else:
        grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        gs, t, u = _backward_terms(value, grad, d, r)
        result = _grad_x(gs, t, d, r, tl.sum(t * u, 1, keep_dims=True), tl.sum(t * d, 1, keep_dims=True), HW)
    store(out + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)


@kernel
def _walk(
    x, x_batch, x_stride, g, g_batch, g_stride, out, sums, C, HW, count,
    LAMBDA: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: ``count`` tiles of a block of planes. A step reads what the steps before it left in ``sums``."""
    program = tl.program_id(0)
    if STEP == "sums" or (STEP == "write" and g is None):
        program = backwards()
    n, c, part = locate(program, C, SPLITS, CHANNELS_LAST, BLOCK_C)
    first = part * count * BLOCK_P
    last = tl.minimum(first + count * BLOCK_P, HW)

    if STEP == "all" or STEP == "moments":
        mean, squares = _moments(x, x_batch, x_stride, n, c, first, last, C, HW, VEC, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    else:
        mean, squares = _merged(sums, n, c, C, HW, count * BLOCK_P, SPLITS)
    if STEP == "moments":
        store(sums + slot(n, MEAN, part, c, C, SPLITS), mean, c < C)
        store(sums + slot(n, SQUARES, part, c, C, SPLITS), squares, c < C)
    else:
        r = 1 / (4 * (squares / (HW.to(squares.dtype) - 1) + LAMBDA))
        tu = tl.zeros_like(r)
        td = tl.zeros_like(r)
        if g is not None:
            if STEP == "write":
                tu = summed(sums, n, TU, c, c < C, C, SPLITS)
                td = summed(sums, n, TD, c, c < C, C, SPLITS)
            else:
                tu_tile = tl.zeros((BLOCK_C, BLOCK_P), r.dtype)
                td_tile = tl.zeros((BLOCK_C, BLOCK_P), r.dtype)
                for p0 in range(first, last, BLOCK_P):
                    p = p0 + tl.arange(0, BLOCK_P)[None, :]
                    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
                    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
                    grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
                    d = tl.where(mask, value - mean, 0.0)
                    _, t, u = _backward_terms(value, grad, d, r)
                    tu_tile += t * u
                    td_tile += t * d
                tu = tl.sum(tu_tile, 1, keep_dims=True)
                td = tl.sum(td_tile, 1, keep_dims=True)
        if STEP == "sums":
            store(sums + slot(n, TU, part, c, C, SPLITS), tu, c < C)
            store(sums + slot(n, TD, part, c, C, SPLITS), td, c < C)
        else:
            for p0 in range(first, last, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)[None, :]
                mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
                value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
                d = value - mean
                if g is None:
                    result = value * tl.sigmoid(d * d * r + 0.5)
                else:
                    grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
                    gs, t, _ = _backward_terms(value, grad, d, r)
                    result = _grad_x(gs, t, d, r, tu, td, HW)
                store(out + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)


@triton.jit
def _moments(
    x, x_batch, x_stride, n, c, first, last, C, HW,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of pixels [first, last), by Welford's recurrence in each lane."""
    p = first + tl.arange(0, BLOCK_P)[None, :]
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), inside(c, p, C, HW, VEC, CHANNELS_LAST))
    mean = value
    squares = tl.zeros_like(value)
    seen = (p < last).to(value.dtype)
    for p0 in range(first + BLOCK_P, last, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        seen += (p < HW).to(value.dtype)
        d = value - mean
        mean += tl.where(mask, d / seen, 0.0)
        squares += tl.where(mask, d * (value - mean), 0.0)
    count = tl.maximum(tl.sum(seen, 1, keep_dims=True), 1)
    total = tl.sum(mean * seen, 1, keep_dims=True) / count
    d = mean - total
    return total, tl.sum(squares + seen * d * d, 1, keep_dims=True)


@triton.jit
def _merged(sums, n, c, C, HW, length, SPLITS: tl.constexpr):
    """Mean and sum of squared deviations of planes whose parts have ``length`` pixels, the last ones fewer or none."""
    part = tl.arange(0, SPLITS)[None, :]
    means = parts(sums, n, MEAN, c, c < C, C, SPLITS)
    sizes = tl.minimum(tl.maximum(HW - part * length, 0), length).to(means.dtype)
    mean = tl.sum(means * sizes, 1, keep_dims=True) / HW.to(means.dtype)
    d = means - mean
    squares = parts(sums, n, SQUARES, c, c < C, C, SPLITS) + sizes * d * d
    return mean, tl.sum(squares, 1, keep_dims=True)
