"""Depthwise convolution: y[c * m + j] = act(x[c] * weight[c * m + j] + bias[c * m + j]), for j < m.

A program has a tile of channels x pixels, the pixels of a block of samples, rows and columns. It loads x once for each
tap, shifted; but for the first time from the cache. Taps outside the map are left out, as 0 * Inf is not 0.

Backward, with the inner gradient g' = grad * act'(z): one launch reads x and grad once. A program computes g' for its
tile, from that its share of the gradients of the weights (`_grad_weight` adds up the shares), and the gradient of x at
the pixels that g' reaches: from the registers, so its tile has a margin of what its neighbours compute, too. Without an
activation g' is grad, which is loaded again instead. If a margin is larger than any tile, `_forward` writes g' first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.depthwise_tiles import Convolution
from convblocks.kernels.gate import activate, activate_backward
from convblocks.kernels.maps import aligned, kernel, load, power_of_2, store

ROWS = tl.constexpr(32)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    conv = Convolution(x, weight, bias, stride, padding, dilation)
    with torch.cuda.device_of(x):
        return _run_forward(conv, None, activation)


def depthwise_conv2d_sums(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> tuple[Tensor, Tensor]:
    conv = Convolution(x, weight, bias, stride, padding, dilation)
    sums = conv.maps.sums(conv.maps.n, conv.channels)
    with torch.cuda.device_of(x):
        y = _run_forward(conv, None, activation, sums)
    return y, sums


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    conv = Convolution(x, weight, bias, stride, padding, dilation)
    grad_x = conv.maps.output()
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    with torch.cuda.device_of(x):
        t = conv.backward_tiling(activation)
        if t is None:
            grad, activation = _run_forward(conv, grad, activation), "none"
            t = conv.backward_tiling(activation)
        assert t is not None  # without a margin there is no limit
        gradient, vector = conv.gradient(grad)
        taps = weight.shape[2] * weight.shape[3]
        shares = conv.maps.sums(t.shares, taps + 1, conv.channels)
        if t.grid:
            _backward[(t.grid,)](
                *conv.maps.arguments,
                *gradient,
                conv.weight,
                conv.bias,
                grad_x,
                shares,
                *conv.sizes,
                *t.blocks,
                ACTIVATION=activation,
                VEC=vector,
                **t.constants,
            )
        block = min(64, power_of_2((taps + 1) * conv.channels))
        _grad_weight[(triton.cdiv((taps + 1) * conv.channels, block),)](
            shares, grad_weight, grad_bias, t.shares, conv.channels, TAPS=taps, BLOCK=block
        )
    return grad_x, grad_weight, x.new_empty(0) if grad_bias is None else grad_bias


def _run_forward(conv: Convolution, grad: Tensor | None, activation: str, sums: Tensor | None = None) -> Tensor:
    """The result, and the sums of its planes if they are asked for; or with its gradient, the inner gradient."""
    y, t = conv.empty(), conv.forward_tiling()
    tiles = t.blocks[1] * t.blocks[2]  # of a plane
    shares = sums if sums is None or tiles == 1 else conv.maps.sums(tiles, *sums.shape)
    none: list[Any] = [None, 0, 0]
    gradient, vector = (none, conv.vector) if grad is None else conv.gradient(grad)
    if y.numel():
        _forward[(t.grid,)](
            *conv.maps.arguments,
            *gradient,
            conv.weight,
            conv.bias,
            y,
            shares,
            *conv.sizes,
            *t.blocks,
            ACTIVATION=activation,
            VEC=vector,
            **t.constants,
        )
        if sums is not None and shares is not sums:
            block = min(64, power_of_2(sums.numel()))
            _sums[(triton.cdiv(sums.numel(), block),)](shares, sums, tiles, sums.numel(), BLOCK=block)
    return y


@triton.jit
def _split(
    c_blocks, h_blocks, w_blocks, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """A program's first sample, its channels (a column), its blocks of rows and of columns, and its number among those
    that have the same channels. Neighbours in memory run at the same time."""
    program = tl.program_id(0)
    if CHANNELS_LAST:
        c_block = program % c_blocks
        share = program // c_blocks
    else:
        c_block = program // (h_blocks * w_blocks) % c_blocks
        share = program // (h_blocks * w_blocks) // c_blocks * (h_blocks * w_blocks) + program % (h_blocks * w_blocks)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    n = (share // (h_blocks * w_blocks)).to(tl.int64) * BLOCK_N
    return n, c, share // w_blocks % h_blocks, share % w_blocks, share.to(tl.int64)


@triton.jit
def _pixels(BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Sample, row and column of the pixels of a block, as a row."""
    p = tl.arange(0, BLOCK_N * BLOCK_H * BLOCK_W)[None, :]
    return p // (BLOCK_H * BLOCK_W), p // BLOCK_W % BLOCK_H, p % BLOCK_W


@triton.jit
def _plane(n, c, batch, stride, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where planes lie in a map."""
    start = n * aligned(batch.to(tl.int64), VEC)
    if CHANNELS_LAST:
        return start + c
    else:
        return start + c * aligned(stride.to(tl.int64), VEC)


@triton.jit
def _rows(row, size):
    return (row >= 0) & (row < size)


@triton.jit
def _columns(column, size, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    return (column >= 0) & (column < (size if CHANNELS_LAST else aligned(size, VEC)))


@triton.jit
def _pitches(W, stride, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """How far apart the rows are, and the columns."""
    if CHANNELS_LAST:
        column = aligned(stride.to(tl.int64), VEC)
        return W * column, column
    else:
        return aligned(W.to(tl.int64), VEC), 1


@triton.jit
def _convolve(
    x, x_stride, row, column, mask, weight, bias, c, c_mask, H, W,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The windows that start at these rows and columns of the padded planes at ``x``."""
    z = tl.zeros(mask.shape, tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    row_pitch, column_pitch = _pitches(W, x_stride, VEC, CHANNELS_LAST)
    x += row * row_pitch + column * column_pitch
    weight += c.to(tl.int64) * (KH * KW)
    for kw in tl.static_range(KW):
        at = x + (kw * DW - LEFT) * column_pitch
        column_mask = mask & _columns(column + (kw * DW - LEFT), W, VEC, CHANNELS_LAST)
        for kh in range(KH):
            in_row = row + (kh * DH - TOP)
            in_mask = column_mask & (in_row >= 0) & (in_row < H)
            value = tl.load(at + (kh * DH - TOP) * row_pitch, mask=in_mask, other=0.0).to(z.dtype)
            w = tl.load(weight + (kh * KW + kw), mask=c_mask, other=0.0).to(z.dtype)
            z += tl.where(in_mask, value * w, 0.0)
    if bias is not None:
        z += load(bias + c, c_mask)
    return z


@kernel
def _forward(
    x, x_batch, x_stride, g, g_batch, g_stride, weight, bias, y, shares,
    N, C, H, W, OH, OW, c_blocks, h_blocks, w_blocks,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the result, of its C channels, and its share of the sums of their planes; or with the
    gradient g of the result, a tile of the inner gradient."""
    first, c, h_block, w_block, _ = _split(c_blocks, h_blocks, w_blocks, CHANNELS_LAST, BLOCK_N, BLOCK_C)
    sample, row, column = _pixels(BLOCK_N, BLOCK_H, BLOCK_W)
    n = first + sample
    row += h_block * BLOCK_H
    column += w_block * BLOCK_W
    c_mask = c < (aligned(C, VEC) if CHANNELS_LAST else C)
    mask = c_mask & (n < N)
    planes = x + _plane(n, c // MULTIPLIER, x_batch, x_stride, VEC, CHANNELS_LAST)
    mask = mask & _rows(row, OH) & _columns(column, OW, VEC, CHANNELS_LAST)
    result = _convolve(
        planes, x_stride, row * SH, column * SW, mask, weight, bias, c, c_mask, H, W,
        KH, KW, DH, DW, TOP, LEFT, VEC, CHANNELS_LAST,
    )  # fmt: skip
    if g is None:
        result = activate(result, ACTIVATION)
    else:
        row_pitch, column_pitch = _pitches(OW, g_stride, VEC, CHANNELS_LAST)
        g += _plane(n, c, g_batch, g_stride, VEC, CHANNELS_LAST) + row * row_pitch + column * column_pitch
        result = activate_backward(load(g, mask), result, ACTIVATION)
    stride = C if CHANNELS_LAST else OH * OW
    row_pitch, column_pitch = _pitches(OW, stride, VEC, CHANNELS_LAST)
    y += _plane(n, c, C.to(tl.int64) * OH * OW, stride, VEC, CHANNELS_LAST)
    store(y + row * row_pitch + column * column_pitch, result, mask)
    if shares is not None:
        own = tl.reshape(tl.where(mask, result, 0.0), (BLOCK_C, BLOCK_N, BLOCK_H * BLOCK_W))
        n = first + tl.arange(0, BLOCK_N)[None, :]
        at = shares + ((h_block * w_blocks + w_block) * N.to(tl.int64) + n) * C + c
        store(at, tl.sum(own, 2), (n < N) & (c < C))


@triton.jit
def _sources(
    block, tap, PIXELS: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Along one side: the windows of a block in which its pixels are met by a tap; some window where there is none."""
    window = (tl.arange(0, PIXELS) + block * (STEP * STRIDE) + (PADDING - tap * DILATION)) // STRIDE
    window -= block * STEP + FIRST
    return tl.where((window >= 0) & (window < BLOCK), window, 0)


@kernel
def _backward(
    x, x_batch, x_stride, g, g_batch, g_stride, weight, bias, grad_x, shares,
    N, C, H, W, OH, OW, c_blocks, h_blocks, w_blocks,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    PIXELS_H: tl.constexpr, PIXELS_W: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the inner gradient, with the margin, its share of the gradients of the weights, and the
    gradient of the pixels of x that are its own."""
    TAPS: tl.constexpr = KH * KW
    channels = C.to(tl.int64)
    C = C // MULTIPLIER  # those of x
    n, c, h_block, w_block, share = _split(c_blocks, h_blocks, w_blocks, CHANNELS_LAST, BLOCK_N, BLOCK_C)
    c_mask = c < (aligned(C, VEC) if CHANNELS_LAST else C)
    sample, row, column = _pixels(BLOCK_N, BLOCK_H, BLOCK_W)
    row += h_block * STEP_H + FIRST_H
    column += w_block * STEP_W + FIRST_W
    mask = c_mask & (n + sample < N) & _rows(row, OH) & _columns(column, OW, VEC, CHANNELS_LAST)
    is_own = mask & (row >= h_block * STEP_H) & (row < (h_block + 1) * STEP_H)
    is_own = is_own & (column >= w_block * STEP_W) & (column < (w_block + 1) * STEP_W)

    x_sample, x_row, x_column = _pixels(BLOCK_N, PIXELS_H, PIXELS_W)
    x_mask = c_mask & (n + x_sample < N) & (x_row < STEP_H * SH) & (x_column < STEP_W * SW)
    x_row += h_block * (STEP_H * SH)
    x_column += w_block * (STEP_W * SW)
    x_mask = x_mask & _rows(x_row, H) & _columns(x_column, W, VEC, CHANNELS_LAST)
    gradient = tl.zeros(x_mask.shape, shares.dtype.element_ty)

    row_pitch, column_pitch = _pitches(W, x_stride, VEC, CHANNELS_LAST)
    g_row_pitch, g_column_pitch = _pitches(OW, g_stride, VEC, CHANNELS_LAST)
    planes = x + _plane(n + sample, c, x_batch, x_stride, VEC, CHANNELS_LAST)
    windows = planes + row * SH * row_pitch + column * SW * column_pitch
    shares += share * (TAPS + 1) * channels
    for j in range(MULTIPLIER):
        channel = c * MULTIPLIER + j
        at = g + _plane(n + sample, channel, g_batch, g_stride, VEC, CHANNELS_LAST)
        inner = load(at + row * g_row_pitch + column * g_column_pitch, mask)
        if ACTIVATION != "none":
            z = _convolve(
                planes, x_stride, row * SH, column * SW, mask, weight, bias, channel, c_mask, H, W,
                KH, KW, DH, DW, TOP, LEFT, VEC, CHANNELS_LAST,
            )  # fmt: skip
            inner = activate_backward(inner, z, ACTIVATION)

        own = tl.where(is_own, inner, 0.0)
        to = shares + channel
        for kw in tl.static_range(KW):
            at = windows + (kw * DW - LEFT) * column_pitch
            column_mask = is_own & _columns(column * SW + (kw * DW - LEFT), W, VEC, CHANNELS_LAST)
            for kh in range(KH):
                in_row = row * SH + (kh * DH - TOP)
                in_mask = column_mask & (in_row >= 0) & (in_row < H)
                value = tl.load(at + (kh * DH - TOP) * row_pitch, mask=in_mask, other=0.0)
                # Taps in the padding multiply by zero: NaN stays NaN, as in torch.
                tl.store(to + (kh * KW + kw) * channels, tl.sum(value.to(own.dtype) * own, 1, keep_dims=True), c_mask)
        tl.store(to + TAPS * channels, tl.sum(own, 1, keep_dims=True), mask=c_mask)

        at = g + _plane(n + x_sample, channel, g_batch, g_stride, VEC, CHANNELS_LAST)
        filters = weight + channel.to(tl.int64) * TAPS
        for kw in tl.static_range(KW):
            from_column = x_column + (LEFT - kw * DW)
            column_mask = x_mask
            if SW > 1:
                column_mask = column_mask & (from_column % SW == 0)
                from_column = from_column // SW
            column_mask = column_mask & _columns(from_column, OW, VEC, CHANNELS_LAST)
            if ACTIVATION != "none":
                lane = _sources(w_block, kw, PIXELS_W, STEP_W, FIRST_W, BLOCK_W, SW, DW, LEFT)
                lane = tl.broadcast_to(lane[None, :], (BLOCK_C * BLOCK_N * BLOCK_H, PIXELS_W))
                across = tl.gather(tl.reshape(inner, (BLOCK_C * BLOCK_N * BLOCK_H, BLOCK_W)), lane, 1)
                across = tl.reshape(across, (BLOCK_C * BLOCK_N, BLOCK_H, PIXELS_W))
            for kh in range(KH):
                from_row = x_row + (TOP - kh * DH)
                met = column_mask
                if SH > 1:
                    met = met & (from_row % SH == 0)
                    from_row = from_row // SH
                met = met & (from_row >= 0) & (from_row < OH)
                if ACTIVATION == "none":
                    value = load(at + from_row * g_row_pitch + from_column * g_column_pitch, met)
                else:
                    down = _sources(h_block, kh, PIXELS_H, STEP_H, FIRST_H, BLOCK_H, SH, DH, TOP)
                    down = tl.broadcast_to(down[None, :, None], (BLOCK_C * BLOCK_N, PIXELS_H, PIXELS_W))
                    value = tl.reshape(tl.gather(across, down, 1), met.shape)
                w = tl.load(filters + (kh * KW + kw), mask=c_mask, other=0.0).to(value.dtype)
                gradient += tl.where(met, value * w, 0.0)

    stride = C if CHANNELS_LAST else H * W
    row_pitch, column_pitch = _pitches(W, stride, VEC, CHANNELS_LAST)
    grad_x += _plane(n + x_sample, c, C.to(tl.int64) * H * W, stride, VEC, CHANNELS_LAST)
    store(grad_x + x_row * row_pitch + x_column * column_pitch, gradient, x_mask)


@triton.jit
def _total(shares, i, count, size):
    """Adds up number i of all shares, each of ``size`` numbers."""
    total = tl.zeros((ROWS, i.shape[1]), shares.dtype.element_ty)
    for first in range(0, count, ROWS):
        share = first + tl.arange(0, ROWS)[:, None]
        total += load(shares + share.to(tl.int64) * size + i, (share < count) & (i < size))
    return tl.sum(total, 0, keep_dims=True)


@kernel
def _grad_weight(shares, grad_weight, grad_bias, count, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: adds up all shares of a block of taps x channels, of which the last tap is the bias."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    result = _total(shares, i, count, (TAPS + 1) * C)
    tap = i // C
    store(grad_weight + (i % C).to(tl.int64) * TAPS + tap, result, tap < TAPS)
    if grad_bias is not None:
        store(grad_bias + i % C, result, tap == TAPS)


@kernel
def _sums(shares, sums, count, size, BLOCK: tl.constexpr):
    """One program: adds up all shares of a block of sums."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    store(sums + i, _total(shares, i, count, size), i < size)
