"""Channel shuffle: y[j * G + i] = x[i * C / G + j], for i < G and j < C / G.

NCHW: planes are copied, whichever channel they come from. channels_last: a pixel is a matrix of G x C / G elements that
is transposed in registers, so that both sides move whole vectors; if the shorter side is not a small power of 2, each
element of the result is fetched from its place.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.maps import Maps, aligned, dense_offsets, inside, kernel, locate, offsets

FEW = (1, 2, 4, 8, 16)  # short sides that are transposed


@kernel
def _copy(
    x,
    x_batch,
    x_stride,
    y,
    C,
    HW,
    blocks,
    count,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``count`` is the number of groups."""
    n, c, block = locate(tl.program_id(0), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    source = c % count * (C // count) + c // count
    value = tl.load(x + offsets(n, source, p, x_batch, x_stride, 1 if CHANNELS_LAST else VEC, CHANNELS_LAST), mask)
    tl.store(y + dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST), value, mask)


@kernel
def _transpose(
    x,
    x_batch,
    x_stride,
    y,
    C,
    HW,
    blocks,
    VEC: tl.constexpr,
    FEW: tl.constexpr,
    GROUPS_ARE_FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Pixels as matrices of FEW rows, or columns, and M of the other: BLOCK_M of those, of BLOCK_P pixels."""
    M = C // FEW
    m_blocks = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    m = program % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    p = (program // m_blocks % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None, None]
    n = (program // m_blocks // blocks).to(tl.int64)
    few = tl.arange(0, FEW)
    rows = few[None, :, None] * aligned(M, VEC) + m[None, None, :]  # FEW streams
    rows_mask = (p < HW) & (m[None, None, :] < aligned(M, VEC))
    from_x = x + n * aligned(x_batch.to(tl.int64), VEC) + p * aligned(x_stride.to(tl.int64), VEC)
    to_y = y + (n * HW + p) * aligned(C, VEC).to(tl.int64)
    c = program % m_blocks * (BLOCK_M * FEW) + tl.arange(0, BLOCK_M * FEW)[None, None, :]  # one stream
    c_mask = (p < HW) & (c < aligned(C, VEC))
    if GROUPS_ARE_FEW:
        value = tl.load(from_x + rows, rows_mask)
        flat = tl.reshape(tl.permute(value, (0, 2, 1)), (BLOCK_P, 1, BLOCK_M * FEW))
        tl.store(to_y + c, flat, c_mask)
    else:
        flat = tl.load(from_x + c, c_mask)
        value = tl.permute(tl.reshape(flat, (BLOCK_P, BLOCK_M, FEW)), (0, 2, 1))
        tl.store(to_y + rows, value, rows_mask)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    maps = Maps(x)
    y = maps.output()
    if y.numel() == 0:
        return y
    few, many = min(groups, maps.c // groups), max(groups, maps.c // groups)
    if maps.channels_last and few in FEW:
        block_m = min(triton.next_power_of_2(many), 1024 // few)
        block_p = min(triton.next_power_of_2(maps.hw), max(1, 2048 // (block_m * few)))
        blocks = triton.cdiv(maps.hw, block_p)
        _transpose[(triton.cdiv(many, block_m) * blocks * maps.n,)](
            *maps.arguments,
            y,
            maps.c,
            maps.hw,
            blocks,
            VEC=math.gcd(maps.vector, many),
            FEW=few,
            GROUPS_ARE_FEW=few == groups,
            BLOCK_M=block_m,
            BLOCK_P=block_p,
        )
        return y
    tile = maps.tile(2048)
    _copy[(maps.n * tile.c_blocks * tile.p_blocks,)](
        *maps.arguments, y, maps.c, maps.hw, tile.p_blocks, groups, **tile.constants
    )
    return y


def channel_shuffle_backward(grad: Tensor, groups: int) -> Tensor:
    return channel_shuffle(grad, grad.shape[1] // groups)
