"""Mean and maximum over the channels of each pixel, of v = x * channel[c].

Backward, with the maximum and the number of channels that have it found again: grad_v = grad_mean / C, and where v is
the maximum its share in grad_max besides; grad_x = grad_v * channel; grad_v * x is summed over the pixels, in parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import Maps, dense_offsets, inside, kernel, load, offsets, store
from convblocks.kernels.pixels import add_parts, place, walk


def channel_pool(x: Tensor, channel: Tensor | None) -> Tensor:
    maps = Maps(x)
    n, _, h, w = x.shape
    y = torch.empty((n, 2, h, w), dtype=x.dtype, device=x.device, memory_format=maps.format)
    if y.numel():
        through = walk(maps, split=False)
        with torch.cuda.device_of(x):
            _forward[(through.programs,)](
                *maps.arguments,
                None if channel is None else channel.contiguous(),
                *_planes(y),
                maps.c,
                maps.hw,
                through.tile.p_blocks,
                **through.tile.constants,
            )
    return y


def channel_pool_backward(grad: Tensor, x: Tensor, channel: Tensor | None) -> tuple[Tensor, Tensor]:
    maps = Maps(x)
    grad_x = maps.output()
    grad_channel = None if channel is None else torch.zeros_like(channel, memory_format=torch.contiguous_format)
    if x.numel():
        through = walk(maps, split=False)
        blocks = through.tile.p_blocks
        parts = None if channel is None else maps.sums(maps.n, blocks, maps.c)
        with torch.cuda.device_of(x):
            _backward[(through.programs,)](
                *maps.arguments,
                None if channel is None else channel.contiguous(),
                *_planes(grad.contiguous(memory_format=maps.format)),
                grad_x,
                parts,
                maps.c,
                maps.hw,
                blocks,
                **through.tile.constants,
            )
            if parts is not None and grad_channel is not None:
                add_parts(parts, grad_channel)
    return grad_x, x.new_empty(0) if grad_channel is None else grad_channel


def _planes(t: Tensor) -> tuple[Tensor, int, int, int]:
    """Two planes, dense in either format, by the strides of batch, plane and pixel."""
    h, w = t.shape[2:]
    pixel = t.stride(3) if w > 1 else t.stride(2) if h > 1 else 1
    return t, t.stride(0), t.stride(1), pixel


@triton.jit
def _gated(
    x, x_batch, x_stride, channel, n, c, p, C, HW, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Values, gates and what of them is in the map."""
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    gate = 1.0 if channel is None else load(channel + n * C + c, c < C)
    return value, gate, mask


@kernel
def _forward(
    x, x_batch, x_stride, channel, y, y_batch, y_plane, y_pixel, C, HW, blocks,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a block of pixels."""
    n, _, p, _ = place(blocks, 1, BLOCK_P)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    most = tl.full((BLOCK_C, BLOCK_P), float("-inf"), dtype)
    bad = tl.zeros((BLOCK_C, BLOCK_P), tl.int32)  # a NaN, which a maximum would pass over
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        value, gate, mask = _gated(x, x_batch, x_stride, channel, n, c, p, C, HW, VEC, CHANNELS_LAST)
        value = value * gate
        total += value
        most = tl.where(mask & (value > most), value, most)
        bad = tl.where(value != value, 1, bad)
    mean = tl.sum(total, 0, keep_dims=True) / C.to(dtype)
    peak = tl.max(most, 0, keep_dims=True)
    peak = tl.where(tl.max(bad, 0, keep_dims=True) > 0, float("nan"), peak)
    at = y + n * y_batch + p * y_pixel
    store(at, mean, p < HW)
    store(at + y_plane, peak, p < HW)


@kernel
def _backward(
    x, x_batch, x_stride, channel, g, g_batch, g_plane, g_pixel, grad_x, parts, C, HW, blocks,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a block of pixels."""
    n, block, p, _ = place(blocks, 1, BLOCK_P)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    most = tl.full((BLOCK_C, BLOCK_P), float("-inf"), dtype)
    ties = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    bad = tl.zeros((BLOCK_C, BLOCK_P), tl.int32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        value, gate, mask = _gated(x, x_batch, x_stride, channel, n, c, p, C, HW, VEC, CHANNELS_LAST)
        value = value * gate
        ties = tl.where(mask & (value > most), 1.0, ties + tl.where(mask & (value == most), 1.0, 0.0))
        most = tl.where(mask & (value > most), value, most)
        bad = tl.where(value != value, 1, bad)
    peak = tl.max(most, 0, keep_dims=True)
    tied = tl.sum(tl.where(most == peak, ties, 0.0), 0, keep_dims=True)
    at = g + n * g_batch + p * g_pixel
    base = load(at, p < HW) / C.to(dtype)
    base = tl.where(tl.max(bad, 0, keep_dims=True) > 0, float("nan"), base)  # as is torch's
    top = load(at + g_plane, p < HW) / tl.where(tied > 0, tied, 1.0)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        value, gate, mask = _gated(x, x_batch, x_stride, channel, n, c, p, C, HW, VEC, CHANNELS_LAST)
        slope = base + tl.where(value * gate == peak, top, 0.0)
        store(grad_x + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), slope * gate, mask)
        if parts is not None:
            dot = tl.sum(tl.where(mask, slope * value, 0.0), 1, keep_dims=True)
            store(parts + (n * blocks + block) * C + c, dot, c < C)
