"""A transform of global context: w2 @ act(layer_norm(w1 @ c + b1)) + b2 of each sample's context c, and its gradients.
The two layers are squeeze-excite's; between them is the norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.layers import Layers, contiguous_like
from convblocks.kernels.maps import Maps, kernel, load, power_of_2, store


class Transform:
    def __init__(self, maps: Maps, contexts: Tensor, tensors: list[Tensor | None], eps: float, activation: str) -> None:
        self.w1, self.b1, self.norm_weight, self.norm_bias, self.w2, self.b2 = (
            None if t is None else t.contiguous() for t in tensors
        )
        self.contexts, self.eps, self.activation = contexts, eps, activation
        self.given, self.layers = tensors, Layers(maps)

    def output(self) -> Tensor | None:
        """What it gives, (N, C); None where it is absent."""
        if self.w1 is None:
            return None
        self._normalize()
        return self.layers.layer(self.normed, self.w2, self.b2, self.activation)

    def _normalize(self) -> None:
        hidden = self.layers.layer(self.contexts, self.w1, self.b1, "none")
        n, r = hidden.shape
        self.unit, self.normed = torch.empty_like(hidden), torch.empty_like(hidden)
        self.rate = hidden.new_empty(n)
        _norm[(n,)](
            hidden,
            self.norm_weight,
            self.norm_bias,
            self.unit,
            self.normed,
            self.rate,
            r,
            self.eps,
            BLOCK=power_of_2(r),
        )

    def backward(self, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the contexts and of the six tensors."""
        if not hasattr(self, "normed"):
            self._normalize()
        g1, gb1, gw, gb, g2, gb2 = (contiguous_like(t) for t in self.given)
        by_normed = self.layers.layer_backward(slope, self.normed, self.w2, g2, gb2, self.activation)
        n, r = by_normed.shape
        by_hidden = torch.empty_like(by_normed)
        _norm_backward[(n,)](by_normed, self.norm_weight, self.unit, self.rate, by_hidden, r, BLOCK=power_of_2(r))
        block = min(power_of_2(r), 128)
        _norm_parameters[(triton.cdiv(r, block),)](by_normed, self.unit, gw, gb, n, r, BLOCK=block)
        by_context = self.layers.layer_backward(by_hidden, self.contexts, self.w1, g1, gb1, "none")
        return by_context, [g1, gb1, gw, gb, g2, gb2]


@kernel
def _norm(hidden, weight, bias, unit, normed, rate, K, eps, BLOCK: tl.constexpr):
    """One program: a sample. In float64: few numbers, of which little may be left when the mean is taken away."""
    r = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * K + r
    value = load(hidden + at, r < K).to(tl.float64)
    d = tl.where(r < K, value - tl.sum(value, 0) / K, 0.0)
    scale = 1 / tl.sqrt(tl.sum(d * d, 0) / K + eps)
    store(unit + at, d * scale, r < K)
    store(normed + at, d * scale * load(weight + r, r < K) + load(bias + r, r < K), r < K)
    one = tl.arange(0, 1)
    store(rate + tl.program_id(0) + one, scale + one * 0, one < 1)


@kernel
def _norm_backward(grad, weight, unit, rate, out, K, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * K + r
    d = load(grad + at, r < K).to(tl.float64) * load(weight + r, r < K)
    u = load(unit + at, r < K).to(tl.float64)
    left = d - tl.sum(d, 0) / K - u * (tl.sum(d * u, 0) / K)
    if K == 1:
        left = 0 * d  # a norm of one number has no gradient
    store(out + at, left * load(rate + tl.program_id(0), True), r < K)


@kernel
def _norm_parameters(grad, unit, grad_weight, grad_bias, N, K, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.zeros((BLOCK,), grad.dtype.element_ty)
    bias = tl.zeros((BLOCK,), grad.dtype.element_ty)
    at = r.to(tl.int64)
    for _ in range(N):
        value = load(grad + at, r < K)
        weight += value * load(unit + at, r < K)
        bias += value
        at += K
    store(grad_weight + r, weight, r < K)
    store(grad_bias + r, bias, r < K)
