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
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import activate, activate_backward, apply_gate, gate_backward
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
from convblocks.kernels.pool import DOT, MAX, TIES, parts, pool, scale, squeezed

SAMPLE_ELEMENTS = 16384  # of a sample that fits the registers
LAYER_ELEMENTS = 4096  # samples x outputs x inputs of a program of a layer
WEIGHT_N, WEIGHT_M, WEIGHT_K = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)  # for the gradient of weights


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
                *(_contiguous(t) for t in (w1, b1, w2, b2)),
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
            squeeze = _Squeeze(maps, add_maxpool)
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
    g1, gb1, g2, gb2 = (None if t is None else _contiguous_like(t) for t in (w1, b1, w2, b2))
    with torch.cuda.device_of(x):
        squeeze = _Squeeze(maps, add_maxpool)
        hidden = None if w1 is None else squeeze.layer(None, w1, b1)
        gates, dz2 = squeeze.layer(hidden, w2, b2, activation, gate, backward=True)
        dp = squeeze.layer_backward(dz2, hidden, w2, g2, gb2, activation)
        if w1 is not None:
            dp = squeeze.layer_backward(dp, None, w1, g1, gb1)
        if grad_x.numel():
            squeeze.grad_x(gates, dp, grad_x)
    none = x.new_empty(0)
    return grad_x, *(none if t is None else t for t in (g1, gb1, g2, gb2))


def _contiguous_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class _Squeeze:
    """The squeezed planes of a map, and the layers above them. A layer takes the values ``hidden`` of the layer below,
    before their activation, or the squeezed planes where that is None."""

    def __init__(self, maps: Maps, add_max: bool) -> None:
        self.maps, self.add_max = maps, add_max
        self.sums, self.splits = pool(maps, add_max)

    def layer(
        self,
        hidden: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        activation: str | None = None,
        gate: str | None = None,
        backward: bool = False,
    ) -> Tensor:
        """(N, M) values, gates with ``gate``; (2, N, M) with their derivatives times q behind them for the backward."""
        n, (m, k) = self.maps.n, w.shape[:2]
        out = self.maps.sums(*((2,) if backward else ()), n, m)
        block_n, block_m = min(power_of_2(n), 8), min(power_of_2(m), 8)
        _layer[(triton.cdiv(n, block_n) * triton.cdiv(m, block_m),)](
            self.sums,
            hidden,
            w.contiguous(),
            _contiguous(b),
            out,
            n,
            m,
            k,
            self.maps.hw,
            ACTIVATION=activation,
            GATE=gate,
            BACKWARD=backward,
            ADD_MAX=self.add_max,
            SPLITS=self.splits,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            BLOCK_K=min(power_of_2(k), LAYER_ELEMENTS // (block_n * max(block_m, self.splits))),
        )
        return out

    def layer_backward(
        self,
        dz: Tensor,
        hidden: Tensor | None,
        w: Tensor,
        grad_w: Tensor | None,
        grad_b: Tensor | None,
        activation: str | None = None,
    ) -> Tensor:
        """The gradient (N, K) of what the layer takes."""
        n, (m, k) = self.maps.n, w.shape[:2]
        out = self.maps.sums(n, k)
        block_n, block_k = min(power_of_2(n), 8), min(power_of_2(k), 8)
        inputs = triton.cdiv(n, block_n) * triton.cdiv(k, block_k)
        weights = triton.cdiv(m, WEIGHT_M.value) * max(1, triton.cdiv(k, WEIGHT_K.value))
        _layer_backward[(inputs + weights,)](
            dz,
            self.sums,
            hidden,
            w.contiguous(),
            out,
            grad_w,
            grad_b,
            n,
            m,
            k,
            self.maps.hw,
            inputs,
            ACTIVATION=activation,
            ADD_MAX=self.add_max,
            SPLITS=self.splits,
            BLOCK_N=block_n,
            BLOCK_M=min(power_of_2(m), LAYER_ELEMENTS // (block_n * block_k)),
            BLOCK_K=block_k,
        )
        return out

    def grad_x(self, gates: Tensor, dp: Tensor, grad_x: Tensor) -> None:
        maps = self.maps
        tile = maps.tile(4096)
        _grad_x[(maps.n * tile.c_blocks * tile.p_blocks,)](
            *maps.arguments,
            self.sums,
            gates,
            dp,
            grad_x,
            maps.c,
            maps.hw,
            tile.p_blocks,
            ADD_MAX=self.add_max,
            SPLITS=self.splits,
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


@triton.jit
def _below(
    sums, hidden, n, k, mask, K, HW, ACTIVATION: tl.constexpr, ADD_MAX: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """What a layer takes: samples (n, 1, 1) x inputs (1, 1, k)."""
    if hidden is None:
        return squeezed(sums, n, k, mask, K, HW, SPLITS, ADD_MAX)
    else:
        return activate(load(hidden + n * K + k, mask), ACTIVATION)


@kernel
def _layer(
    sums, hidden, w, b, out, N, M, K, HW,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr, ADD_MAX: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a block of outputs of a block of samples."""
    blocks = tl.cdiv(M, BLOCK_M)
    n = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    products = tl.zeros((BLOCK_N, BLOCK_M, BLOCK_K), out.dtype.element_ty)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, None, :]
        value = _below(
            sums, hidden, n[:, :, None], k, (n < N)[:, :, None] & (k < K), K, HW, ACTIVATION, ADD_MAX, SPLITS
        )
        products += value * load(w + m[:, :, None].to(tl.int64) * K + k, (m < M)[:, :, None] & (k < K))
    z = tl.sum(products, 2)
    if b is not None:
        z += load(b + m, m < M)
    mask = (n < N) & (m < M)
    at = out + n * M + m
    if GATE is None:
        store(at, z, mask)
    else:
        store(at, apply_gate(z, GATE), mask)
    if BACKWARD:
        q = tl.sum(parts(sums, n[:, :, None], DOT, m[:, None, :], mask[:, None, :], M, SPLITS), 1)
        store(at + N.to(tl.int64) * M, gate_backward(q, z, GATE), mask)


@kernel
def _layer_backward(
    dz, sums, hidden, w, out, grad_w, grad_b, N, M, K, HW, count,
    ACTIVATION: tl.constexpr, ADD_MAX: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first ``count`` programs: the gradient of a block of inputs. The others: of a block of weights."""
    program = tl.program_id(0)
    if program < count:
        blocks = tl.cdiv(K, BLOCK_K)
        n = (program // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        k = program % blocks * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        _grad_inputs(dz, hidden, w, out, n, k, N, M, K, ACTIVATION, BLOCK_N, BLOCK_M, BLOCK_K)
    else:
        blocks = tl.maximum(tl.cdiv(K, WEIGHT_K), 1)
        m_block = (program - count) // blocks
        k_block = (program - count) % blocks
        _grad_weights(dz, sums, hidden, grad_w, grad_b, m_block, k_block, N, M, K, HW, ACTIVATION, ADD_MAX, SPLITS)


@triton.jit
def _grad_inputs(
    dz, hidden, w, out, n, k, N, M, K,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    products = tl.zeros((BLOCK_N, BLOCK_M, BLOCK_K), out.dtype.element_ty)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)[None, :, None]
        slope = load(dz + n[:, :, None] * M + m, (n < N)[:, :, None] & (m < M))
        products += slope * load(w + m.to(tl.int64) * K + k[:, None, :], (m < M) & (k < K)[:, None, :])
    gradient = tl.sum(products, 1)
    at = n * K + k
    mask = (n < N) & (k < K)
    if hidden is not None:
        gradient = activate_backward(gradient, load(hidden + at, mask), ACTIVATION)
    store(out + at, gradient, mask)


@triton.jit
def _grad_weights(
    dz, sums, hidden, grad_w, grad_b, m_block, k_block, N, M, K, HW,
    ACTIVATION: tl.constexpr, ADD_MAX: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    m = m_block * WEIGHT_M + tl.arange(0, WEIGHT_M)[:, None]
    k = k_block * WEIGHT_K + tl.arange(0, WEIGHT_K)[None, :]
    weight = tl.zeros((WEIGHT_N, WEIGHT_M, WEIGHT_K), dz.dtype.element_ty)
    bias = tl.zeros((WEIGHT_N, WEIGHT_M, 1), dz.dtype.element_ty)
    for first in range(0, N, WEIGHT_N):
        n = first + tl.arange(0, WEIGHT_N)[:, None, None].to(tl.int64)
        slope = load(dz + n * M + m[None, :, :], (n < N) & (m < M)[None, :, :])
        inside = (n < N) & (k < K)[None, :, :]
        weight += slope * _below(sums, hidden, n, k[None, :, :], inside, K, HW, ACTIVATION, ADD_MAX, SPLITS)
        bias += slope
    store(grad_w + m.to(tl.int64) * K + k, tl.sum(weight, 0), (m < M) & (k < K))
    if grad_b is not None:
        if k_block == 0:
            store(grad_b + m, tl.sum(bias, 0), m < M)


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
