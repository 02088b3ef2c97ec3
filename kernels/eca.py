"""ECA: y = x * gate(z), z = the convolution over the channels, with k taps, of their means p.

Forward: `pool`, `_gate`, `scale`; but a sample that fits the registers of one program is read once (`_sample`).
Backward: `pool` also sums q = grad * x; `_gate` computes dz = q * gate'(z) and, in rows, what each program adds to the
gradient of the weight; `_grad_x` writes grad * gate + dp / HW, where dp is the transposed convolution of dz;
`_grad_weight` adds up the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import apply_gate, gate_backward
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
    widen,
)
from convblocks.kernels.pool import DOT, pool, scale, squeezed, summed

SAMPLE_ELEMENTS = 16384  # of a sample that fits the registers
GATE_ELEMENTS = 256  # channels x parts of their sums of one program, a warp
ROWS = tl.constexpr(64)


def eca(x: Tensor, weight: Tensor, bias: Tensor | None, gate: str, padding: str) -> Tensor:
    maps = Maps(x)
    y = maps.output()
    if y.numel() == 0:
        return y
    weights, constants = _weights(weight, bias, gate, padding)
    block_c, block_p = power_of_2(maps.c), power_of_2(maps.hw)
    with torch.cuda.device_of(x):
        if block_c * block_p <= SAMPLE_ELEMENTS:
            tile = maps.tile_of(block_c, block_p)
            _sample[(maps.n,)](*maps.arguments, *weights, y, maps.c, maps.hw, **constants, **tile.constants)
            return y
        sums, splits = pool(maps, add_max=False)
        gates = maps.sums(maps.n, maps.c)
        block = min(power_of_2(maps.c), GATE_ELEMENTS // splits)
        _gate[(maps.n * triton.cdiv(maps.c, block),)](
            sums, *weights, gates, None, maps.n, maps.c, maps.hw, SPLITS=splits, BLOCK=block, num_warps=1, **constants
        )
        scale(maps, gates, y)
    return y


def eca_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: str, padding: str
) -> tuple[Tensor, Tensor, Tensor]:
    maps = Maps(x, grad)
    weights, constants = _weights(weight, bias, gate, padding)
    taps = constants["TAPS"]
    grad_x, grad_weight = maps.output(), torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    gates = maps.sums(2, maps.n, maps.c)
    with torch.cuda.device_of(x):
        sums, splits = pool(maps, add_max=False)
        block = min(power_of_2(maps.c), GATE_ELEMENTS // splits)
        rows = maps.sums(maps.n * triton.cdiv(maps.c, block), taps + 1)
        _gate[(len(rows),)](
            sums, *weights, gates, rows, maps.n, maps.c, maps.hw, SPLITS=splits, BLOCK=block, num_warps=1, **constants
        )
        _grad_weight[(1,)](rows, grad_weight, grad_bias, len(rows), TAPS=taps, BLOCK=power_of_2(taps + 1))
        if grad_x.numel():
            tile = maps.tile(4096)
            _grad_x[(maps.n * tile.c_blocks * tile.p_blocks,)](
                *maps.arguments[3:],
                gates,
                weights[0],
                grad_x,
                maps.n,
                maps.c,
                maps.hw,
                tile.p_blocks,
                TAPS=taps,
                CIRCULAR=constants["CIRCULAR"],
                **tile.constants,
            )
    return grad_x, grad_weight, x.new_empty(0) if grad_bias is None else grad_bias


def _weights(
    weight: Tensor, bias: Tensor | None, gate: str, padding: str
) -> tuple[tuple[Tensor, Tensor | None], dict[str, Any]]:
    """Weight and bias as the kernels read them, and what they know of them when compiled."""
    constants = {"TAPS": weight.shape[-1], "CIRCULAR": padding == "circular", "GATE": gate}
    return (weight.contiguous(), bias), constants


@triton.jit
def _neighbour(c, offset, C, CIRCULAR: tl.constexpr):
    """The channel at this offset; it may be outside [0, C) where there is none."""
    channel = c + offset
    if CIRCULAR:
        channel = tl.where(channel < 0, channel + C, tl.where(channel >= C, channel - C, channel))
    return channel


@triton.jit
def _logit(
    sums, n, c, mask, weight, bias, C, HW, TAPS: tl.constexpr, CIRCULAR: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """z of channels (c, 1), from the sums of `pool`."""
    z = tl.zeros(mask.shape, sums.dtype.element_ty)
    for tap in range(TAPS):
        channel = _neighbour(c, tap - TAPS // 2, C, CIRCULAR)
        valid = mask & (channel >= 0) & (channel < C)
        z += widen(tl.load(weight + tap)) * squeezed(sums, n, channel, valid, C, HW, SPLITS, False)
    if bias is not None:
        z += widen(tl.load(bias))
    return z


@kernel
def _sample(
    x, x_batch, x_stride, weight, bias, y, C, HW,
    TAPS: tl.constexpr, CIRCULAR: tl.constexpr, GATE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a whole sample."""
    n, c, _ = locate(tl.program_id(0), C, 1, CHANNELS_LAST, BLOCK_C)
    p = tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    mean = tl.sum(value, 1) / HW.to(value.dtype)
    channels = tl.arange(0, BLOCK_C)
    z = tl.zeros_like(mean)
    for tap in range(TAPS):
        channel = _neighbour(channels, tap - TAPS // 2, C, CIRCULAR)
        valid = (channel >= 0) & (channel < C)
        z += widen(tl.load(weight + tap)) * tl.where(valid, tl.gather(mean, tl.where(valid, channel, 0), 0), 0.0)
    if bias is not None:
        z += widen(tl.load(bias))
    result = value * apply_gate(z, GATE)[:, None]
    store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)


@kernel
def _gate(
    sums, weight, bias, gates, rows, N, C, HW,
    TAPS: tl.constexpr, CIRCULAR: tl.constexpr, GATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of the gates of a sample; for the backward also dz behind them, and in its row what they
    add to the gradient of the weight and, behind that, of the bias."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK)
    n = (program // blocks).to(tl.int64)
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = c < C
    z = _logit(sums, n, c, mask, weight, bias, C, HW, TAPS, CIRCULAR, SPLITS)
    store(gates + n * C + c, apply_gate(z, GATE), mask)
    if rows is not None:
        dz = tl.where(mask, gate_backward(summed(sums, n, DOT, c, mask, C, SPLITS), z, GATE), 0.0)
        store(gates + (N + n) * C + c, dz, mask)
        row = rows + program.to(tl.int64) * (TAPS + 1)
        for tap in range(TAPS):
            channel = _neighbour(c, tap - TAPS // 2, C, CIRCULAR)
            valid = mask & (channel >= 0) & (channel < C)
            mean = squeezed(sums, n, channel, valid, C, HW, SPLITS, False)
            tl.store(row + tap, tl.sum(tl.where(valid, dz * mean, 0.0)))
        tl.store(row + TAPS, tl.sum(dz))


@kernel
def _grad_weight(rows, grad_weight, grad_bias, count, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: adds up all rows."""
    tap = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), rows.dtype.element_ty)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += load(rows + row * (TAPS + 1) + tap, (row < count) & (tap <= TAPS))
    gradient = tl.sum(total, 0, keep_dims=True)
    store(grad_weight + tap, gradient, tap < TAPS)
    if grad_bias is not None:
        store(grad_bias + tap - TAPS, gradient, tap == TAPS)


@kernel
def _grad_x(
    g, g_batch, g_stride, gates, weight, grad_x, N, C, HW, blocks,
    TAPS: tl.constexpr, CIRCULAR: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile."""
    n, c, block = locate(backwards(), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
    gate = load(gates + n * C + c, c < C)
    dz = gates + (N + n) * C
    dp = tl.zeros_like(gate)
    for tap in range(TAPS):
        channel = _neighbour(c, TAPS // 2 - tap, C, CIRCULAR)
        dp += widen(tl.load(weight + tap)) * load(dz + channel, (c < C) & (channel >= 0) & (channel < C))
    result = grad * gate + dp / HW.to(dp.dtype)
    store(grad_x + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)
