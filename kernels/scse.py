"""Concurrent spatial and channel squeeze-and-excitation: s, a gate per channel, is that of squeeze-and-excitation;
q = sigmoid(w . x + b) is a gate per pixel; and x s is combined with x q.

A program that has all channels of a pixel computes q where it needs it, of what it has read anyway. Forward: `pool`,
the layers for s, and `_apply`. Backward: `pool` sums x and grad * x, the layers go both ways, `_grad_x` has the rest.
Where the gradient of s depends on q (max, mul), `_crossed` takes it first, which is one more read of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.layers import Layers, contiguous_like
from convblocks.kernels.maps import (
    ENOUGH,
    SECTOR,
    Maps,
    Tile,
    aligned,
    backwards,
    dense_offsets,
    inside,
    kernel,
    load,
    offsets,
    power_of_2,
    store,
    widen,
)
from convblocks.kernels.pool import DOT, MAX_SPLITS, SUM, pool, slot

ROWS, COLUMNS = tl.constexpr(64), tl.constexpr(32)  # of a tile of the sums for the gradient of w


def scse(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    mode: str,
) -> Tensor:
    maps = Maps(x)
    n, c, height, width = x.shape
    mode = mode if w1 is not None else "spatial"
    size = (n, 2 * c if mode == "concat" else c, height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=maps.format)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        gates = None
        if w1 is not None and w2 is not None:
            layers = Layers(maps, *pool(maps, False))
            gates = layers.layer(layers.layer(None, w1, b1), w2, b2, "relu", "sigmoid")
        tile = _tile(maps, a_thread=16)
        _apply[(n * tile.p_blocks,)](
            *maps.arguments,
            gates,
            w.contiguous(),
            b,
            y,
            c,
            maps.hw,
            tile.p_blocks,
            MODE=mode,
            **tile.constants,
        )
    return y


def scse_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c = x.shape[1]
    mode = mode if w1 is not None else "spatial"
    grads = (grad[:, :c], grad[:, c:]) if mode == "concat" else (grad,)
    maps = Maps(x, *grads)
    grad_x = maps.output()
    g1, gb1, g2, gb2, gw, gb = (None if t is None else contiguous_like(t) for t in (w1, b1, w2, b2, w, b))
    weight = w.contiguous()
    with torch.cuda.device_of(x):
        gates = share = None
        if w1 is not None and w2 is not None:
            if mode in ("max", "mul"):
                single = Maps(maps.arguments[0], channels_last=maps.channels_last)
                layers = Layers(single, *pool(single, False))
                gates = layers.layer(layers.layer(None, w1, b1), w2, b2, "relu", "sigmoid")
                layers = _crossed_gates(maps, gates, weight, b, mode)
            else:
                layers = Layers(maps, *pool(Maps(*maps.arguments[:4:3], channels_last=maps.channels_last), False))
            hidden = layers.layer(None, w1, b1)
            gates, dz = layers.layer(hidden, w2, b2, "relu", "sigmoid", backward=True)
            share = layers.layer_backward(layers.layer_backward(dz, hidden, w2, g2, gb2, "relu"), None, w1, g1, gb1)
        tile = _tile(maps, a_thread=8)
        count = triton.cdiv(tile.p_blocks * maps.n, ENOUGH)
        parts = triton.cdiv(tile.p_blocks, count) if count else 0
        rows = maps.n * parts
        sums, bias = maps.sums(rows, c), maps.sums(rows)
        if rows:
            _grad_x[(rows,)](
                *_three(maps),
                gates,
                share,
                weight,
                b,
                grad_x,
                sums,
                bias,
                c,
                maps.hw,
                tile.p_blocks,
                count,
                parts,
                MODE=mode,
                **tile.constants,
            )
        _grad_w[(triton.cdiv(c, COLUMNS.value),)](sums, bias, gw, gb, rows, c)
    none = x.new_empty(0)
    return grad_x, *(none if t is None else t for t in (g1, gb1, g2, gb2)), gw, none if gb is None else gb


def _tile(maps: Maps, a_thread: int) -> Tile:
    """All channels, of as many pixels as fit; of a sector of them at least."""
    c, p = power_of_2(maps.c), power_of_2(maps.hw)
    least = 1 if maps.channels_last else SECTOR // maps.itemsize
    pixels = max(1, min(max(least, 4096 // c), 16384 // c))
    while c * pixels > 2048 and pixels > least and maps.n * triton.cdiv(maps.hw, pixels) < ENOUGH:
        pixels //= 2
    return maps.tile_of(c, min(p, pixels), a_thread)


def _three(maps: Maps) -> tuple[object, ...]:
    """Of x, and one gradient or two: None for the second one where there is one."""
    return (*maps.arguments, *((None, 0, 0) if len(maps.arguments) == 6 else ()))


def _crossed_gates(maps: Maps, gates: Tensor, w: Tensor, b: Tensor | None, mode: str) -> Layers:
    """The sums over x, and those for the gradients of the channel gates in the place of those over grad * x."""
    tile = _tile(maps, a_thread=8)
    splits = 1
    while splits < MAX_SPLITS and 2 * splits <= tile.p_blocks and maps.n * splits < ENOUGH:
        splits *= 2
    sums = maps.sums(maps.n, 4, splits, maps.c)
    _crossed[(maps.n * splits,)](
        *maps.arguments,
        gates,
        w,
        b,
        sums,
        maps.c,
        maps.hw,
        triton.cdiv(tile.p_blocks, splits),
        SPLITS=splits,
        MODE=mode,
        **tile.constants,
    )
    return Layers(maps, sums, splits)


@triton.jit
def _combined(x, s, q, MODE: tl.constexpr):
    if MODE == "spatial":
        return x * q
    elif MODE == "max":
        return tl.where((x * q > x * s) | (x * q != x * q), x * q, x * s)
    elif MODE == "mul":
        return (x * s) * (x * q)
    else:
        return x * s + x * q


@triton.jit
def _slopes(grad, grad_spatial, x, s, q, MODE: tl.constexpr):
    """The gradients of x * s and of x * q."""
    if MODE == "max":
        half = tl.where(x * s == x * q, 0.5 * grad, grad)
        return tl.where(x * s < x * q, 0.0, half), tl.where(x * s > x * q, 0.0, half)
    elif MODE == "mul":
        return grad * (x * q), grad * (x * s)
    else:
        return grad, grad_spatial


@triton.jit
def _gate(value, weight, b):
    """Of the pixels, from all of their channels."""
    z = tl.sum(value * weight, 0, keep_dims=True)
    if b is not None:
        z += widen(tl.load(b))
    return tl.sigmoid(z)


@kernel
def _apply(
    x, x_batch, x_stride, gates, w, b, y, C, HW, blocks, MODE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: all channels of some pixels."""
    program = backwards()
    n = (program // blocks).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[:, None]
    p = (program % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    q = _gate(value, load(w + c, c < C), b)
    s = 0.0
    if MODE != "spatial":
        s = load(gates + n * C + c, c < C)
    if MODE == "concat":
        if CHANNELS_LAST:
            half = aligned(C, VEC).to(tl.int64)
        else:
            half = C * aligned(HW.to(tl.int64), VEC)
        at = dense_offsets(n, c, p, 2 * C, HW, VEC, CHANNELS_LAST)
        store(y + at, value * s, mask)
        store(y + half + at, value * q, mask)
    else:
        store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), _combined(value, s, q, MODE), mask)


@kernel
def _crossed(
    x, x_batch, x_stride, g, g_batch, g_stride, gates, w, b, sums, C, HW, count,
    SPLITS: tl.constexpr, MODE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: all channels of ``count`` tiles of pixels."""
    n = (tl.program_id(0) // SPLITS).to(tl.int64)
    part = tl.program_id(0) % SPLITS
    c = tl.arange(0, BLOCK_C)[:, None]
    weight = load(w + c, c < C)
    s = load(gates + n * C + c, c < C)
    total = tl.zeros((BLOCK_C, BLOCK_P), sums.dtype.element_ty)
    dot = tl.zeros((BLOCK_C, BLOCK_P), sums.dtype.element_ty)
    first = part.to(tl.int64) * count * BLOCK_P
    for p0 in range(first, tl.minimum(first + count * BLOCK_P, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        slope, _ = _slopes(grad, grad, value, s, _gate(value, weight, b), MODE)
        total += value
        dot += tl.where(mask, slope * value, 0.0)
    at = sums + slot(n, SUM, part, c, C, SPLITS)
    store(at, tl.sum(total, 1, keep_dims=True), c < C)
    store(at + (DOT - SUM) * SPLITS * C.to(tl.int64), tl.sum(dot, 1, keep_dims=True), c < C)


@kernel
def _grad_x(
    x, x_batch, x_stride, g, g_batch, g_stride, r, r_batch, r_stride, gates, share, w, b, grad_x, sums, bias,
    C, HW, blocks, count, parts, MODE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: all channels of ``count`` tiles of pixels. ``r`` is the gradient of x q for concat."""
    program = backwards()
    n = (program // parts).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[:, None]
    weight = load(w + c, c < C)
    s = 0.0
    if MODE != "spatial":
        s = load(gates + n * C + c, c < C)
        shift = load(share + n * C + c, c < C) / HW.to(sums.dtype.element_ty)
    by_w = tl.zeros((BLOCK_C, BLOCK_P), sums.dtype.element_ty)
    by_b = tl.zeros((1, BLOCK_P), sums.dtype.element_ty)
    first = (program % parts).to(tl.int64) * count
    for block in range(first, tl.minimum(first + count, blocks)):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        grad_spatial = grad
        if r is not None:
            grad_spatial = load(r + offsets(n, c, p, r_batch, r_stride, VEC, CHANNELS_LAST), mask)
        q = _gate(value, weight, b)
        by_channel, by_spatial = _slopes(grad, grad_spatial, value, s, q, MODE)
        t = tl.sum(tl.where(mask, by_spatial * value, 0.0), 0, keep_dims=True)
        dz = tl.where(p < HW, t * (q * (1 - q)), 0.0)
        result = by_spatial * q + dz * weight
        if MODE != "spatial":
            result += by_channel * s + shift
        store(grad_x + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)
        by_w += tl.where(mask, dz * value, 0.0)
        by_b += dz
    store(sums + program.to(tl.int64) * C + c, tl.sum(by_w, 1, keep_dims=True), c < C)
    tl.store(bias + program, tl.sum(by_b))


@kernel
def _grad_w(sums, bias, grad_w, grad_b, N, C):
    """One program: some channels, over N rows of sums."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), sums.dtype.element_ty)
    shares = tl.zeros((ROWS, 1), sums.dtype.element_ty)
    for first in range(0, N, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += load(sums + row.to(tl.int64) * C + c, (row < N) & (c < C))
        shares += load(bias + row, row < N)
    store(grad_w + c, tl.sum(total, 0, keep_dims=True), c < C)
    if grad_b is not None:
        if tl.program_id(0) == 0:
            tl.store(grad_b, tl.sum(shares).to(grad_b.dtype.element_ty))
