"""Gates of channels and pixels: y = x * (channel[c] * spatial[p] + more), more = 1 with the residual.

Backward, in one pass: grad_x = grad * (channel * spatial + more), and the sums of grad * x * spatial over pixels and of
grad * x * channel over channels, in parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import Maps, dense_offsets, inside, kernel, load, locate, offsets, store
from convblocks.kernels.pixels import add_parts, place, walk


def apply_gates(x: Tensor, channel: Tensor | None, spatial: Tensor | None, residual: bool) -> Tensor:
    maps = Maps(x)
    y = maps.output()
    tile = maps.tile(4096) if spatial is None else walk(maps, split=True).tile  # a pixel's gate for many channels
    if y.numel():
        with torch.cuda.device_of(x):
            _forward[(maps.n * tile.c_blocks * tile.p_blocks,)](
                *maps.arguments,
                *map(_contiguous, (channel, spatial)),
                y,
                maps.c,
                maps.hw,
                tile.p_blocks,
                RESIDUAL=residual,
                **tile.constants,
            )
    return y


def apply_gates_backward(
    grad: Tensor, x: Tensor, channel: Tensor | None, spatial: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    maps = Maps(x, grad)
    grad_x = maps.output()
    grads = [
        None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (channel, spatial)
    ]
    if x.numel():
        through = walk(maps, split=True)
        blocks = through.tile.p_blocks
        parts = (
            None if channel is None else maps.sums(maps.n, blocks, maps.c),
            None if spatial is None else maps.sums(maps.n, through.groups, maps.hw),
        )
        with torch.cuda.device_of(x):
            _backward[(through.programs,)](
                *maps.arguments,
                *map(_contiguous, (channel, spatial)),
                grad_x,
                *parts,
                maps.c,
                maps.hw,
                blocks,
                through.count,
                through.groups,
                RESIDUAL=residual,
                **through.tile.constants,
            )
            for part, out in zip(parts, grads, strict=True):
                if part is not None and out is not None:
                    add_parts(part, out)
    none = x.new_empty(0)
    return grad_x, *(none if t is None else t for t in grads)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@triton.jit
def _product(channel, spatial, RESIDUAL: tl.constexpr):
    if channel is None:
        gate = spatial
    elif spatial is None:
        gate = channel
    else:
        gate = channel * spatial
    if RESIDUAL:
        gate += 1
    return gate


@kernel
def _forward(
    x, x_batch, x_stride, channel, spatial, y, C, HW, blocks, RESIDUAL: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile."""
    n, c, block = locate(tl.program_id(0), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    of_c = None if channel is None else load(channel + n * C + c, c < C)
    of_p = None if spatial is None else load(spatial + n * HW + p, p < HW)
    store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), value * _product(of_c, of_p, RESIDUAL), mask)


@kernel
def _backward(
    x, x_batch, x_stride, g, g_batch, g_stride, channel, spatial, grad_x, channel_parts, spatial_parts,
    C, HW, blocks, count, groups, RESIDUAL: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: ``count`` tiles of a block of pixels."""
    n, block, p, group = place(blocks, groups, BLOCK_P)
    of_p = None if spatial is None else load(spatial + n * HW + p, p < HW)
    if spatial_parts is not None:
        total = tl.zeros((BLOCK_C, BLOCK_P), spatial_parts.dtype.element_ty)
    first = group * count * BLOCK_C
    for c0 in range(first, tl.minimum(first + count * BLOCK_C, C), BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        of_c = None if channel is None else load(channel + n * C + c, c < C)
        at = dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST)
        store(grad_x + at, grad * _product(of_c, of_p, RESIDUAL), mask)
        product = grad * value
        if spatial_parts is not None:
            total += product if of_c is None else product * of_c
        if channel_parts is not None:
            dot = tl.sum(product if of_p is None else product * of_p, 1, keep_dims=True)
            store(channel_parts + (n * blocks + block) * C + c, dot, c < C)
    if spatial_parts is not None:
        store(spatial_parts + (n * groups + group) * HW + p, tl.sum(total, 0, keep_dims=True), p < HW)
