"""ECA: y = x * gate(z), z = the convolution over the channels, with k taps, of their means p.

Forward: `pool`, then `_scale`, whose programs compute the gates of their channels from the means. A sample that fits the
registers of one program is done in one launch and read once (`_sample`).
Backward: `pool` also sums q = grad * x; `_gate` computes dz = q * gate'(z) and sums the gradient of the weight in parts;
`_grad_x` writes grad * gate + dp / HW, where dp is the transposed convolution of dz; `_grad_weight` adds up the parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convblocks.kernels.gate import apply_gate, gate_slope
from convblocks.kernels.maps import (
    Maps,
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
from convblocks.kernels.pool import DOT, pool, squeezed, summed

SAMPLE_ELEMENTS = 16384  # of a sample that fits the registers
GATE_BLOCK = 1024  # gates of one program


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
        tile = maps.tile(4096)
        programs = (maps.n * tile.c_blocks * tile.p_blocks,)
        constants.update(tile.constants, SPLITS=splits)
        _scale[programs](*maps.arguments, sums, *weights, y, maps.c, maps.hw, tile.p_blocks, **constants)
    return y


def eca_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: str, padding: str
) -> tuple[Tensor, Tensor, Tensor]:
    maps = Maps(x, grad)
    weights, constants = _weights(weight, bias, gate, padding)
    taps = constants["TAPS"]
    grad_x, grad_weight = maps.output(), torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0 if bias is None else 1)
    blocks = triton.cdiv(maps.n * maps.c, GATE_BLOCK)
    gates, parts = maps.sums(2, maps.n, maps.c), maps.sums(blocks, taps + 1)
    with torch.cuda.device_of(x):
        sums, splits = pool(maps, add_max=False)
        _gate[(blocks,)](
            sums, *weights, gates, parts, maps.n, maps.c, maps.hw, SPLITS=splits, BLOCK=GATE_BLOCK, **constants
        )
        _grad_weight[(1,)](parts, grad_weight, grad_bias, blocks, TAPS=taps, BLOCK=power_of_2(taps + 1))
        if grad_x.numel():
            tile = maps.tile(4096)
            del constants["GATE"]
            programs = (maps.n * tile.c_blocks * tile.p_blocks,)
            _grad_x[programs](
                *maps.arguments[3:], gates, weights[0], grad_x, maps.n, maps.c, maps.hw, tile.p_blocks, **constants, **tile.constants
            )
    return grad_x, grad_weight, grad_bias
