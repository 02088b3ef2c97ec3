"""The small layers between the squeezed planes of a map and its gates: z2 = W2 act(z1) + b2, z1 = W1 p + b1, or one
layer, z2 = W2 p + b2. And their gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import activate, activate_backward, apply_gate, gate_backward
from convblocks.kernels.maps import Maps, kernel, load, power_of_2, store
from convblocks.kernels.pool import DOT, parts, squeezed

LAYER_ELEMENTS = 4096  # samples x outputs x inputs of a program of a layer
WEIGHT_N, WEIGHT_M, WEIGHT_K = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)  # for the gradient of weights


def contiguous_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class Layers:
    """The layers above the squeezed planes of a map (pool.py). A layer takes the values ``hidden`` of the layer below,
    before their activation, or the squeezed planes where that is None; of ``ways`` times as many samples as the map
    has."""

    def __init__(
        self, maps: Maps, sums: Tensor | None = None, splits: int = 1, add_max: bool = False, ways: int = 1
    ) -> None:
        self.maps, self.sums, self.splits, self.add_max, self.n = maps, sums, splits, add_max, ways * maps.n

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
        n, (m, k) = self.n, w.shape[:2]
        out = self.maps.sums(*((2,) if backward else ()), n, m)
        block_n, block_m = min(power_of_2(n), 8), min(power_of_2(m), 8)
        _layer[(triton.cdiv(n, block_n) * triton.cdiv(m, block_m),)](
            self.sums,
            hidden,
            w.contiguous(),
            contiguous(b),
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
            num_warps=8,
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
        n, (m, k) = self.n, w.shape[:2]
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
