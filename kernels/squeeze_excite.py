"""Squeeze-and-excitation: y = x * gate(z2), z2 = W2 act(z1) + b2, z1 = W1 p + b1, p the squeezed planes.
One layer: z2 = W2 p + b2.

Forward: `pool`, `_layer` for z1 and for the gates, `scale`; but a sample that fits the registers of one program is read
once (`_sample`).
Backward: `pool` also sums q = grad * x; `_layer` recomputes z1, the gates, and gives dz2 = q * gate'(z2);
`_layer_backward` takes dz2 to dz1 and dz1 to dp, each with the gradients of its weights; `_grad_x` writes grad * gate
and the share of each pixel in dp.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import activate, apply_gate
from convblocks.kernels.layers import LAYER_ELEMENTS, Layers, contiguous, contiguous_like
from convblocks.kernels.maps import (
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
from convblocks.kernels.pool import MAX, TIES, parts, pool, scale

SAMPLE_ELEMENTS = 16384  # of a sample that fits the registers


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gate: str,
    add_maxpool: bool,
) -> Tensor:
    maps = Maps(x)
    y = maps.output()
    if y.numel() == 0:
        return y
    block_c, block_p = power_of_2(maps.c), power_of_2(maps.hw)
    with torch.cuda.device_of(x):
        if w1 is not None and block_c * block_p <= SAMPLE_ELEMENTS:
            tile = maps.tile_of(block_c, block_p)
            r = w1.shape[0]
            _sample[(maps.n,)](
                *maps.arguments,
                *(contiguous(t) for t in (w1, b1, w2, b2)),
                y,
                maps.c,
                maps.hw,
                r,
                ACTIVATION=activation,
                GATE=gate,
                ADD_MAX=add_maxpool,
                BLOCK_R=min(power_of_2(r), max(1, LAYER_ELEMENTS // block_c)),
                **tile.constants,
            )
        else:
            squeeze = Layers(maps, *pool(maps, add_maxpool), add_maxpool)
            hidden = None if w1 is None else squeeze.layer(None, w1, b1)
            scale(maps, squeeze.layer(hidden, w2, b2, activation, gate), y)
    return y


def squeeze_excite_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gate: str,
    add_maxpool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = Maps(x, grad)
    grad_x = maps.output()
    g1, gb1, g2, gb2 = (None if t is None else contiguous_like(t) for t in (w1, b1, w2, b2))
    with torch.cuda.device_of(x):
        squeeze = Layers(maps, *pool(maps, add_maxpool), add_maxpool)
        hidden = None if w1 is None else squeeze.layer(None, w1, b1)
        gates, dz2 = squeeze.layer(hidden, w2, b2, activation, gate, backward=True)
        dp = squeeze.layer_backward(dz2, hidden, w2, g2, gb2, activation)
        if w1 is not None:
            dp = squeeze.layer_backward(dp, None, w1, g1, gb1)
        if grad_x.numel():
            _write_grad_x(squeeze, gates, dp, grad_x)
    none = x.new_empty(0)
    return grad_x, *(none if t is None else t for t in (g1, gb1, g2, gb2))


def _write_grad_x(squeeze: Layers, gates: Tensor, dp: Tensor, grad_x: Tensor) -> None:
    maps = squeeze.maps
    tile = maps.tile(4096)
    _grad_x[(maps.n * tile.c_blocks * tile.p_blocks,)](
        *maps.arguments,
        squeeze.sums,
        gates,
        dp,
        grad_x,
        maps.c,
        maps.hw,
        tile.p_blocks,
        ADD_MAX=squeeze.add_max,
        SPLITS=squeeze.splits,
        **tile.constants,
    )


@kernel
def _sample(
    x, x_batch, x_stride, w1, b1, w2, b2, y, C, HW, K,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, ADD_MAX: tl.constexpr, BLOCK_R: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a whole sample."""
    n, c, _ = locate(tl.program_id(0), C, 1, CHANNELS_LAST, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    squeeze = tl.sum(value, 1) / HW.to(value.dtype)
    if ADD_MAX:
        squeeze = 0.5 * squeeze + 0.5 * tl.max(tl.where(mask, value, float("-inf")), 1)
    channel = tl.arange(0, BLOCK_C)
    squeeze = tl.where(channel < C, squeeze, 0.0)
    z2 = tl.zeros_like(squeeze)
    for first in range(0, K, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        rows = r[:, None] * C + channel[None, :]
        z1 = tl.sum(load(w1 + rows, (r[:, None] < K) & (channel[None, :] < C)) * squeeze[None, :], 1)
        if b1 is not None:
            z1 += load(b1 + r, r < K)
        columns = channel[:, None] * K + r[None, :]
        weights = load(w2 + columns, (channel[:, None] < C) & (r[None, :] < K))
        z2 += tl.sum(weights * activate(z1, ACTIVATION)[None, :], 1)
    if b2 is not None:
        z2 += load(b2 + channel, channel < C)
    result = value * apply_gate(z2, GATE)[:, None]
    store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)


@kernel
def _grad_x(
    x, x_batch, x_stride, g, g_batch, g_stride, sums, gates, dp, grad_x, C, HW, blocks,
    ADD_MAX: tl.constexpr, SPLITS: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile."""
    n, c, block = locate(backwards(), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
    gate = load(gates + n * C + c, c < C)
    share = load(dp + n * C + c, c < C)
    result = grad * gate
    if ADD_MAX:
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        tops = parts(sums, n, MAX, c, c < C, C, SPLITS)
        top = tl.max(tops, 1, keep_dims=True)
        ties = tl.sum(tl.where(tops == top, parts(sums, n, TIES, c, c < C, C, SPLITS), 0.0), 1, keep_dims=True)
        result += 0.5 * share / HW.to(share.dtype) + tl.where(value == top, 0.5 * share / ties, 0.0)
    else:
        result += share / HW.to(share.dtype)
    store(grad_x + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)
