"""Global context: y = x * gate(scale(c)) + add(c), c the sum of the pixels weighted by attention, or their mean.

Forward: `_pool` and `_merge` for the contexts, `transform.py` for the transforms, `_change`.
Backward: `_pool` also sums grad * x and grad; the transforms take these back to the contexts;
`_grad_x` writes the gradient of x and what that of the attention's weight is made of.
A program takes all channels of some pixels at once, so that logits and weighted sums come from one read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import apply_gate, gate_backward
from convblocks.kernels.maps import (
    ENOUGH,
    SECTOR,
    Maps,
    Tile,
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
from convblocks.kernels.transform import Transform

MAX_SPLITS = 64
KINDS = tl.constexpr(3)  # of sums: attention * x, grad * x, grad


def global_context(x: Tensor, *args: Tensor | float | str | None) -> Tensor:
    *tensors, eps, activation, gate = args
    maps = Maps(x)
    y = maps.output()
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        pooled = _Pooled(maps, tensors[0], tensors[1])
        scale, add = (Transform(maps, pooled.contexts, tensors[i : i + 6], eps, activation) for i in (2, 8))
        _change_maps(maps, scale.output(), add.output(), y, 1, gate)
    return y


def global_context_backward(grad: Tensor, x: Tensor, *args: Tensor | float | str | None) -> tuple[Tensor, ...]:
    *tensors, eps, activation, gate = args
    maps = Maps(x, grad)
    grad_x, none = maps.output(), x.new_empty(0)
    with torch.cuda.device_of(x):
        pooled = _Pooled(maps, tensors[0], tensors[1])
        scale, add = (Transform(maps, pooled.contexts, tensors[i : i + 6], eps, activation) for i in (2, 8))
        logits, by_scale, by_add = scale.output(), None, None
        grads: list[Tensor | None] = [None] * 14
        if logits is not None:
            slope = torch.empty_like(logits)
            n = slope.numel()
            _slopes[(triton.cdiv(n, 1024),)](pooled.dot, logits, slope, n, GATE=gate, BLOCK=1024)
            by_scale, grads[2:8] = scale.backward(slope)
        if add.w1 is not None:
            by_add, grads[8:14] = add.backward(pooled.grad)
        by_context = by_add if by_scale is None else by_scale if by_add is None else by_scale + by_add
        if x.numel() == 0:
            grads[:2] = (None if t is None else torch.zeros_like(t) for t in tensors[:2])
        elif tensors[0] is None:
            grad_maps = Maps(grad, channels_last=maps.channels_last)
            _change_maps(grad_maps, logits, by_context, grad_x, maps.hw, gate)
        else:
            shares = pooled.grad_x(logits, by_context, grad_x, gate)
            grads[0] = shares[:, :-1].sum(0).to(tensors[0].dtype).view(tensors[0].shape)
            if tensors[1] is not None:  # attention does not change with it: 0, or not a number
                grads[1] = (shares[:, -1:].sum(0) * 0).to(tensors[1].dtype)
    return grad_x, *(none if t is None else t for t in grads)


class _Pooled:
    """The contexts (N, C) of a map, and of map and gradient the sums of their product and of the gradient."""

    def __init__(self, maps: Maps, weight: Tensor | None, bias: Tensor | None) -> None:
        self.maps = maps
        self.weight = None if weight is None else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        if 0 in (maps.n, maps.c, maps.hw):  # the mean of no pixels is no number
            self.contexts, self.dot, self.grad = maps.sums(KINDS.value, maps.n, maps.c).zero_()
            if weight is None:
                self.contexts.fill_(float("nan"))
            return
        self.tile = self._tile()
        tiles = self.tile.p_blocks
        self.count = triton.cdiv(tiles, min(MAX_SPLITS, max(1, triton.cdiv(ENOUGH, maps.n))))
        self.splits = triton.cdiv(tiles, self.count)
        shares = maps.sums(maps.n, self.splits, KINDS.value, maps.c)
        numbers = maps.sums(maps.n, self.splits, 2)
        _pool[(maps.n * self.splits,)](
            *maps.pair(),
            self.weight,
            self.bias,
            shares,
            numbers,
            maps.c,
            maps.hw,
            self.splits,
            self.count,
            **self.tile.constants,
        )
        self.numbers = maps.sums(maps.n, 2)
        out = maps.sums(KINDS.value, maps.n, maps.c)
        self.contexts, self.dot, self.grad = out
        block = min(power_of_2(maps.c), 256)
        blocks = triton.cdiv(maps.c, block)
        _merge[(maps.n * blocks,)](
            shares,
            numbers,
            out,
            self.numbers,
            maps.n,
            maps.c,
            self.splits,
            blocks,
            BACKWARD=len(maps.arguments) > 3,
            SPLITS=power_of_2(self.splits),
            BLOCK_C=block,
        )

    def _tile(self) -> Tile:
        """All channels, and so many pixels that each channel's fill a sector."""
        block_c = power_of_2(self.maps.c)
        least = 1 if self.maps.channels_last else SECTOR // self.maps.itemsize
        block_p = min(power_of_2(self.maps.hw), max(least, 2048 // block_c))
        tile = self.maps.tile_of(block_c, block_p, a_thread=8)
        if self.maps.vector == 1:  # an address for each number: registers for fewer of them
            tile.constants["num_warps"] = min(16, 2 * tile.constants["num_warps"])
        return tile

    def grad_x(self, logits: Tensor | None, by_context: Tensor, grad_x: Tensor, gate: str) -> Tensor:
        """Writes grad_x; returns the programs' shares in the gradients of the attention's weight and bias."""
        maps = self.maps
        shares = maps.sums(maps.n * self.splits, maps.c + 1)
        _grad_x[(maps.n * self.splits,)](
            *maps.arguments,
            self.weight,
            self.bias,
            self.contexts,
            by_context,
            logits,
            self.numbers,
            grad_x,
            shares,
            maps.c,
            maps.hw,
            self.splits,
            self.count,
            GATE=gate,
            **self.tile.constants,
        )
        return shares


def _change_maps(maps: Maps, logits: Tensor | None, shift: Tensor | None, y: Tensor, divisor: int, gate: str) -> None:
    tile = maps.tile(4096)
    programs = (maps.n * tile.c_blocks * tile.p_blocks,)
    _change[programs](
        *maps.arguments[:3], logits, shift, y, maps.c, maps.hw, tile.p_blocks, divisor, GATE=gate, **tile.constants
    )


@triton.jit
def _logits(value, weight, bias, c, C):
    z = tl.sum(value * load(weight + c, c < C), 0)
    if bias is not None:
        z += 0 * load(bias, True)  # attention does not change with it, unless it is not finite
    return z


@kernel
def _pool(
    x, x_batch, x_stride, g, g_batch, g_stride, weight, bias, shares, numbers, C, HW, blocks, count,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: ``count`` tiles of a sample."""
    dtype: tl.constexpr = shares.dtype.element_ty
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * count * BLOCK_P
    c = tl.arange(0, BLOCK_C)[:, None]
    context = tl.zeros((BLOCK_C,), dtype)
    dot = tl.zeros((BLOCK_C,), dtype)
    grad = tl.zeros((BLOCK_C,), dtype)
    total = tl.zeros((1,), dtype)
    maximum = tl.full((1,), float("-inf"), dtype)
    for p0 in range(first, tl.minimum(first + count * BLOCK_P, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        there = p0 + tl.arange(0, BLOCK_P) < HW
        if weight is not None:
            z = tl.where(there, _logits(value, weight, bias, c, C), float("-inf"))
            higher = tl.maximum(maximum, tl.max(z, 0))
            taken_off = tl.where(higher == float("-inf"), 0.0, higher)  # all of these have exponentials of 0
            attention = tl.where(there, tl.exp(z - taken_off), 0.0)
            rescale = tl.exp(maximum - taken_off)
            total = total * rescale + tl.sum(attention, 0)
            context = context * rescale + tl.sum(value * attention[None, :], 1)
            maximum = higher
        else:
            total += tl.sum(tl.where(there, 1.0, 0.0), 0)
            context += tl.sum(value, 1)
        if g is not None:
            gradient = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
            dot += tl.sum(value * gradient, 1)
            grad += tl.sum(gradient, 1)
    channel = tl.arange(0, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    at = shares + program * KINDS * C + channel
    store(at, context, channel < C)
    if g is not None:
        store(at + C, dot, channel < C)
        store(at + 2 * C, grad, channel < C)
    one = tl.arange(0, 1)
    if weight is None:
        maximum = tl.zeros((1,), dtype)
    store(numbers + 2 * program + one, maximum, one < 1)
    store(numbers + 2 * program + 1 + one, total, one < 1)


@kernel
def _merge(
    shares, numbers, out, merged, N, C, blocks, c_blocks,
    BACKWARD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a block of the channels of a sample; ``blocks`` programs have left shares of it."""
    n = (tl.program_id(0) // c_blocks).to(tl.int64)
    c = tl.program_id(0) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, SPLITS)
    at = numbers + 2 * (n * blocks + s)
    maxima = tl.where(s < blocks, load(at, s < blocks), float("-inf"))
    maximum = tl.max(maxima, 0)
    factor = tl.where(s < blocks, tl.exp(maxima - maximum), 0.0)
    total = tl.sum(factor * load(at + 1, s < blocks), 0)
    share = shares + (n * blocks + s[:, None]) * KINDS * C + c[None, :]
    mask = (s[:, None] < blocks) & (c[None, :] < C)
    store(out + n * C + c, tl.sum(load(share, mask) * factor[:, None], 0) / total, c < C)
    if BACKWARD:
        for kind in tl.static_range(1, KINDS):
            store(out + (kind * N.to(tl.int64) + n) * C + c, tl.sum(load(share + kind * C, mask), 0), c < C)
    one = tl.arange(0, 1)
    if tl.program_id(0) % c_blocks == 0:
        store(merged + 2 * n + one, maximum + tl.zeros_like(total) + one * 0, one < 1)
        store(merged + 2 * n + 1 + one, 1 / total + one * 0, one < 1)


@kernel
def _slopes(dot, logits, out, count, GATE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    store(out + i, gate_backward(load(dot + i, i < count), load(logits + i, i < count), GATE), i < count)


@kernel
def _change(
    x, x_batch, x_stride, logits, shift, y, C, HW, blocks, width,
    GATE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile of x * gate(logit) + shift / width."""
    n, c, block = locate(backwards(), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    result = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    if logits is not None:
        result *= apply_gate(load(logits + n * C + c, c < C), GATE)
    if shift is not None:
        change = load(shift + n * C + c, c < C)
        result += change / width.to(change.dtype)
    store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)


@kernel
def _grad_x(
    x, x_batch, x_stride, g, g_batch, g_stride, weight, bias, contexts, by_context, logits, numbers, grad_x, shares,
    C, HW, blocks, count,
    GATE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: ``count`` tiles of a sample. Of x - context, as dz sums to 0: exact where one pixel has all
    attention."""
    dtype: tl.constexpr = shares.dtype.element_ty
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * count * BLOCK_P
    c = tl.arange(0, BLOCK_C)[:, None]
    w = load(weight + c, c < C)
    mean = load(contexts + n * C + c, c < C)
    gc = load(by_context + n * C + c, c < C)
    maximum = load(numbers + 2 * n, True)
    factor = load(numbers + 2 * n + 1, True)
    share = tl.zeros((BLOCK_C,), dtype)
    total = tl.zeros((1,), dtype)
    for p0 in range(first, tl.minimum(first + count * BLOCK_P, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        there = p0 + tl.arange(0, BLOCK_P) < HW
        z = _logits(value, weight, bias, c, C)
        attention = tl.where(there, tl.exp(z - maximum) * factor, 0.0)
        centered = value - mean
        dz = tl.where(there, attention * tl.sum(gc * centered, 0), 0.0)
        result = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        if logits is not None:
            result *= apply_gate(load(logits + n * C + c, c < C), GATE)
        result += attention[None, :] * gc + dz[None, :] * w
        store(grad_x + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), result, mask)
        share += tl.sum(dz[None, :] * centered, 1)
        total += tl.sum(dz, 0)
    channel = tl.arange(0, BLOCK_C)
    at = shares + tl.program_id(0).to(tl.int64) * (C + 1)
    store(at + channel, share, channel < C)
    one = tl.arange(0, 1)
    store(at + C + one, total, one < 1)
