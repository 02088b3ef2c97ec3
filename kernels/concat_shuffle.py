"""Concatenation and channel shuffle: with cat the parts side by side, whole[j * G + i] = cat[i * C / G + j], for i < G
and j < C / G; or back.

NCHW: planes are copied, to wherever their channels go. channels_last: cat is a matrix of G x C / G channels; its few
rows, or columns, are woven in registers, so that both sides move whole vectors. If there are not few, or if a part ends
within one, each channel is moved on its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import Maps, aligned, inside, is_channels_last, kernel, locate, offsets

FEW = (1, 2, 4, 8, 16)  # streams that are woven


@kernel
def _copy(
    x,
    x_batch,
    x_stride,
    y,
    y_batch,
    y_stride,
    C,
    HW,
    blocks,
    first,
    width,
    count,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BACK: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """x is the part that begins at channel ``first`` of cat, y the whole of ``count`` groups of ``width`` channels."""
    n, c, block = locate(tl.program_id(0), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    part = x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST)
    if ONE:  # group: nothing but a concatenation
        whole = y + offsets(n, aligned(first, VEC) + c, p, y_batch, y_stride, VEC, CHANNELS_LAST)
    else:
        place = (first + c) % width * count + (first + c) // width
        whole = y + offsets(n, place, p, y_batch, y_stride, 1 if CHANNELS_LAST else VEC, CHANNELS_LAST)
    if BACK:
        tl.store(part, tl.load(whole, mask), mask)
    else:
        tl.store(whole, tl.load(part, mask), mask)


@triton.jit
def _pixels(n, p, batch, stride, VEC: tl.constexpr):
    return n * aligned(batch.to(tl.int64), VEC) + p * aligned(stride.to(tl.int64), VEC)


@kernel
def _weave(
    x,
    x_batch,
    x_stride,
    g,
    g_batch,
    g_stride,
    y,
    y_batch,
    y_stride,
    M,
    apart,
    HW,
    blocks,
    VEC: tl.constexpr,
    FEW: tl.constexpr,
    IN_X: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """FEW streams of M channels, ``apart`` from each other, of which the first IN_X are in x and the others in g; in y
    they alternate. BLOCK_M channels of each, of BLOCK_P pixels."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    m = program % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None, None, :]
    p = (program // m_blocks % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None, None]
    n = (program // m_blocks // blocks).to(tl.int64)
    few = tl.arange(0, FEW)[None, :, None]
    loose = x + _pixels(n, p, x_batch, x_stride, VEC) + few * aligned(apart, VEC) + m
    if IN_X < FEW:
        other = g + _pixels(n, p, g_batch, g_stride, VEC) + (few - IN_X) * aligned(apart, VEC) + m
        loose = tl.where(few < IN_X, loose, other)
    loose_mask = (p < HW) & (m < aligned(M, VEC))
    c = program % m_blocks * (BLOCK_M * FEW) + tl.arange(0, BLOCK_M * FEW)[None, None, :]
    woven = y + _pixels(n, p, y_batch, y_stride, VEC) + c
    woven_mask = (p < HW) & (c < aligned(M, VEC) * FEW)
    if BACK:
        flat = tl.load(woven, woven_mask)
        tl.store(loose, tl.permute(tl.reshape(flat, (BLOCK_P, BLOCK_M, FEW)), (0, 2, 1)), loose_mask)
    else:
        value = tl.permute(tl.load(loose, loose_mask), (0, 2, 1))
        tl.store(woven, tl.reshape(value, (BLOCK_P, 1, BLOCK_M * FEW)), woven_mask)


def _launch_weave(loose: list[Maps], woven: Maps, few: int, in_x: int, length: int, apart: int, back: bool) -> None:
    x, g = loose[0], loose[-1]
    vector = math.gcd(x.vector, g.vector, woven.vector, length, apart)
    elements = 2048 if vector > 1 and woven.itemsize < 8 else 1024  # few where each has an address
    block_m = min(triton.next_power_of_2(length), 1024 // few)
    block_p = min(triton.next_power_of_2(woven.hw), max(1, elements // (block_m * few)))
    blocks = triton.cdiv(woven.hw, block_p)
    _weave[(triton.cdiv(length, block_m) * blocks * woven.n,)](
        *x.arguments,
        *g.arguments,
        *woven.arguments,
        length,
        apart,
        woven.hw,
        blocks,
        VEC=vector,
        FEW=few,
        IN_X=in_x,
        BACK=back,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
    )


def move(tensors: list[Tensor], y: Tensor, groups: int, back: bool) -> None:
    """The whole y from the parts, or back; in the layout of y, whatever that of the parts is."""
    channels_last = is_channels_last(y)
    whole = Maps(y, channels_last=channels_last)
    parts = [Maps(t, channels_last=channels_last) for t in tensors if t.shape[1]]
    width = whole.c // groups
    are_few = channels_last and min(groups, width) in FEW and all(part.c % width == 0 for part in parts)
    if are_few and groups <= width and len(parts) <= 2:
        return _launch_weave(parts, whole, groups, parts[0].c // width, width, width, back)
    first = 0
    for part in parts:
        if are_few and width < groups:
            stretch = Maps(whole.arguments[0][:, first // width :], channels_last=True)
            _launch_weave([stretch], part, width, width, part.c // width, groups, not back)
        else:
            if not channels_last or groups == 1:
                part.vector = math.gcd(part.vector, whole.vector, first if channels_last else 0)
            tile = part.tile(2048)
            _copy[(part.n * tile.c_blocks * tile.p_blocks,)](
                *part.arguments,
                *whole.arguments,
                part.c,
                part.hw,
                tile.p_blocks,
                first,
                width,
                groups,
                BACK=back,
                ONE=channels_last and groups == 1,
                **tile.constants,
            )
        first += part.c


def _empty(like: Tensor, channels: int) -> Tensor:
    size = (like.shape[0], channels, *like.shape[2:])
    memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def concat_shuffle(tensors: list[Tensor], groups: int) -> Tensor:
    y = _empty(tensors[0], sum(t.shape[1] for t in tensors))
    if y.numel():
        move(tensors, y, groups, back=False)
    return y


def concat_shuffle_backward(grad: Tensor, channels: list[int], groups: int) -> list[Tensor]:
    gradients = [_empty(grad, c) for c in channels]
    if grad.numel():
        move(gradients, grad, groups, back=True)
    return gradients
