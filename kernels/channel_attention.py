"""Channel attention: gate(mlp(mean) + mlp(max)) of each plane, mlp(p) = W2 act(W1 p + b1) + b2.

`pool`, `_pooled` for (2 N, C) numbers, the means and then the maxima, the layers over all of them, `_gates` for the sum
of the two halves. Backward: the same again; both halves of the logits have the same gradient; `_grad_x` writes each
pixel's share in the gradients of the pooled numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import apply_gate, gate_backward
from convblocks.kernels.layers import Layers, contiguous_like
from convblocks.kernels.maps import Maps, backwards, dense_offsets, inside, kernel, load, locate, offsets, store
from convblocks.kernels.pool import MAX, SUM, TIES, parts, pool, summed

NUMBERS = tl.constexpr(256)  # of a program


def channel_attention(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, gate: str
) -> Tensor:
    maps = Maps(x)
    y = torch.empty((*x.shape[:2], 1, 1), dtype=x.dtype, device=x.device, memory_format=maps.format)
    if y.numel():
        with torch.cuda.device_of(x):
            _Attention(maps, w1, b1, w2, b2, activation).gates(gate, y)
    return y


def channel_attention_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = Maps(x)
    grad_x = maps.output()
    g1, gb1, g2, gb2 = (None if t is None else contiguous_like(t) for t in (w1, b1, w2, b2))
    with torch.cuda.device_of(x):
        attention = _Attention(maps, w1, b1, w2, b2, activation, ties=True)
        layers = attention.layers
        dz = attention.gates(gate, maps.sums(2, maps.n, maps.c), grad.contiguous())
        dz = layers.layer_backward(dz, attention.hidden, w2, g2, gb2, activation)
        attention.grad_x(layers.layer_backward(dz, attention.pooled, w1, g1, gb1, "none"), grad_x)
    none = x.new_empty(0)
    return grad_x, *(none if t is None else t for t in (g1, gb1, g2, gb2))


class _Attention:
    """What both ways compute of a map: the pooled numbers, (2, N, C), and what the layers make of them."""

    def __init__(
        self,
        maps: Maps,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        ties: bool = False,
    ) -> None:
        self.maps = maps
        self.sums, self.splits = pool(maps, True, ties)
        self.layers = Layers(maps, self.sums, self.splits, ways=2)
        self.pooled = maps.sums(2, maps.n, maps.c)
        if self.pooled.numel():
            programs = (maps.n * triton.cdiv(maps.c, NUMBERS.value),)
            _pooled[programs](self.sums, self.pooled, maps.n, maps.c, maps.hw, SPLITS=self.splits)
        self.hidden = self.layers.layer(self.pooled, w1, b1, "none")
        self.logits = self.layers.layer(self.hidden, w2, b2, activation)

    def gates(self, gate: str, out: Tensor, grad: Tensor | None = None) -> Tensor:
        """(N, C) gates, or with their ``grad`` that of the logits, (2, N, C)."""
        count = self.maps.n * self.maps.c
        if count:
            _gates[(triton.cdiv(count, NUMBERS.value),)](self.logits, grad, out, count, GATE=gate)
        return out

    def grad_x(self, dp: Tensor, grad_x: Tensor) -> None:
        maps = self.maps
        tile = maps.tile(4096)
        if grad_x.numel():
            _grad_x[(maps.n * tile.c_blocks * tile.p_blocks,)](
                *maps.arguments,
                self.sums,
                dp,
                grad_x,
                maps.n,
                maps.c,
                maps.hw,
                tile.p_blocks,
                SPLITS=self.splits,
                **tile.constants,
            )


@kernel
def _pooled(sums, pooled, N, C, HW, SPLITS: tl.constexpr):
    """One program: means and maxima of some channels of a sample."""
    blocks = tl.cdiv(C, NUMBERS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * NUMBERS + tl.arange(0, NUMBERS)[:, None]
    total = summed(sums, n, SUM, c, c < C, C, SPLITS)
    highest = tl.max(parts(sums, n, MAX, c, c < C, C, SPLITS), 1, keep_dims=True)
    mean = total / HW.to(total.dtype)
    highest = tl.where(mean != mean, mean, highest)  # a NaN, which a maximum passes over
    store(pooled + n * C + c, mean, c < C)
    store(pooled + (N + n) * C + c, highest, c < C)


@kernel
def _gates(logits, grad, out, count, GATE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    mask = i < count
    logit = load(logits + i, mask) + load(logits + count + i, mask)
    if grad is None:
        store(out + i, apply_gate(logit, GATE), mask)
    else:
        slope = gate_backward(load(grad + i, mask), logit, GATE)
        store(out + i, slope, mask)
        store(out + count + i, slope, mask)


@kernel
def _grad_x(
    x, x_batch, x_stride, sums, dp, grad_x, N, C, HW, blocks, SPLITS: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile."""
    n, c, block = locate(backwards(), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    mean = load(dp + n * C + c, c < C)
    tops = parts(sums, n, MAX, c, c < C, C, SPLITS)
    top = tl.max(tops, 1, keep_dims=True)
    ties = tl.sum(tl.where(tops == top, parts(sums, n, TIES, c, c < C, C, SPLITS), 0.0), 1, keep_dims=True)
    share = load(dp + (N + n) * C + c, c < C) / ties
    result = mean / HW.to(mean.dtype) + tl.where(value == top, share, 0.0)
    store(grad_x + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)
