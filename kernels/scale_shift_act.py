"""Batch norm at inference with what follows it: y = act(z), z = x * scale[c] + shift[c] + residual.

Backward, with g = grad * act'(z): grad_x = g * scale, grad_residual = g; `_backward` also sums g * x and g over the
tiles of each program, into a row for each sample and part of its planes; `_grad_channels` adds up the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import activate, activate_backward
from convblocks.kernels.maps import Maps, dense_offsets, inside, kernel, load, locate, offsets, store
from convblocks.kernels.pool import WALK_ELEMENTS, splits_of

ROWS, COLUMNS = tl.constexpr(32), tl.constexpr(32)


def scale_shift_act(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    y = Maps(x).output()
    _write(y, x, scale, shift, residual, activation)
    return y


def scale_shift_act_(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> None:
    memory = x.untyped_storage().data_ptr()
    others = [t for t in (scale, shift, residual) if t is not None and t is not x]
    is_apart = all(t.untyped_storage().data_ptr() != memory for t in others)  # else read where x is written over
    if is_apart and Maps(x).arguments[0] is x:
        _write(x, x, scale, shift, residual, activation)
    else:
        x.copy_(scale_shift_act(x, scale, shift, residual, activation))


def scale_shift_act_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps, arguments = _maps(residual, x, grad)
    grad_x, grad_residual = maps.output(), None if residual is None else maps.output()
    grad_scale, grad_shift = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (scale, shift))
    tile = maps.tile(WALK_ELEMENTS, a_thread=8)
    splits = splits_of(maps, tile)
    rows = maps.sums(2, maps.n * splits, maps.c)
    with torch.cuda.device_of(x):
        if x.numel():
            _backward[(maps.n * tile.c_blocks * splits,)](
                *arguments,
                scale.contiguous(),
                shift.contiguous(),
                grad_x,
                grad_residual,
                rows,
                maps.n,
                maps.c,
                maps.hw,
                triton.cdiv(tile.p_blocks, splits),
                ACTIVATION=activation,
                SPLITS=splits,
                **tile.constants,
            )
        else:
            rows.zero_()
        _grad_channels[(triton.cdiv(maps.c, COLUMNS.value),)](rows, grad_scale, grad_shift, maps.n * splits, maps.c)
    return grad_x, grad_scale, grad_shift, x.new_empty(0) if grad_residual is None else grad_residual


def _maps(residual: Tensor | None, *others: Tensor) -> tuple[Maps, tuple[Any, ...]]:
    """The maps of a call, and the arguments of its kernel: the residual, or None, is the last."""
    if residual is None:
        maps = Maps(*others)
        return maps, (*maps.arguments, None, 0, 0)
    maps = Maps(*others, residual)
    return maps, tuple(maps.arguments)


def _write(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> None:
    if x.numel() == 0:
        return
    maps, arguments = _maps(residual, x, y)
    tile = maps.tile(4096)
    with torch.cuda.device_of(x):
        _forward[(maps.n * tile.c_blocks * tile.p_blocks,)](
            *arguments,
            scale.contiguous(),
            shift.contiguous(),
            maps.c,
            maps.hw,
            tile.p_blocks,
            ACTIVATION=activation,
            **tile.constants,
        )


@kernel
def _forward(
    x, x_batch, x_stride, y, y_batch, y_stride, r, r_batch, r_stride, scale, shift, C, HW, blocks,
    ACTIVATION: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: a tile."""
    n, c, block = locate(tl.program_id(0), C, blocks, CHANNELS_LAST, BLOCK_C)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
    z = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
    z = z * load(scale + c, c < C) + load(shift + c, c < C)
    if r is not None:
        z += load(r + offsets(n, c, p, r_batch, r_stride, VEC, CHANNELS_LAST), mask)
    store(y + offsets(n, c, p, y_batch, y_stride, VEC, CHANNELS_LAST), activate(z, ACTIVATION), mask)


@kernel
def _backward(
    x, x_batch, x_stride, g, g_batch, g_stride, r, r_batch, r_stride, scale, shift, grad_x, grad_residual, rows,
    N, C, HW, count, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: ``count`` tiles of a block of planes."""
    n, c, part = locate(tl.program_id(0), C, SPLITS, CHANNELS_LAST, BLOCK_C)
    a = load(scale + c, c < C)
    b = load(shift + c, c < C)
    dot = tl.zeros((BLOCK_C, BLOCK_P), rows.dtype.element_ty)
    total = tl.zeros((BLOCK_C, BLOCK_P), rows.dtype.element_ty)
    first = part * count * BLOCK_P
    for p0 in range(first, tl.minimum(first + count * BLOCK_P, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = inside(c, p, C, HW, VEC, CHANNELS_LAST)
        value = load(x + offsets(n, c, p, x_batch, x_stride, VEC, CHANNELS_LAST), mask)
        grad = load(g + offsets(n, c, p, g_batch, g_stride, VEC, CHANNELS_LAST), mask)
        if ACTIVATION != "none":
            z = value * a + b
            if r is not None:
                z += load(r + offsets(n, c, p, r_batch, r_stride, VEC, CHANNELS_LAST), mask)
            grad = activate_backward(grad, z, ACTIVATION)
        at = dense_offsets(n, c, p, C, HW, VEC, CHANNELS_LAST)
        store(grad_x + at, grad * a, mask)
        if grad_residual is not None:
            store(grad_residual + at, grad, mask)
        dot += grad * value
        total += grad
    row = (n * SPLITS + part) * C + c
    store(rows + row, tl.sum(dot, 1, keep_dims=True), c < C)
    store(rows + row + N.to(tl.int64) * SPLITS * C, tl.sum(total, 1, keep_dims=True), c < C)


@kernel
def _grad_channels(rows, grad_scale, grad_shift, count, C):
    """One program: adds up the rows of some channels."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    dot = tl.zeros((ROWS, COLUMNS), rows.dtype.element_ty)
    total = tl.zeros((ROWS, COLUMNS), rows.dtype.element_ty)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (row < count) & (c < C)
        dot += load(rows + row * C + c, mask)
        total += load(rows + (row + count) * C + c, mask)
    store(grad_scale + c, tl.sum(dot, 0, keep_dims=True), c < C)
    store(grad_shift + c, tl.sum(total, 0, keep_dims=True), c < C)
