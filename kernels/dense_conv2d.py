"""Dense convolution: the convolution is torch's, what follows it is scale_shift_act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convblocks.kernels.maps import is_channels_last
from convblocks.kernels.scale_shift_act import scale_shift_act, scale_shift_act_backward


def _convolved(x: Tensor, weight: Tensor, how: Sequence[Any]) -> Tensor:
    z = torch.nn.functional.conv2d(x, weight.to(x.dtype), None, *how)
    return _like(z, x)


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _channels(z: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 and 0 where there is none."""
    like = next((t for t in (scale, shift) if t is not None), z)
    ones = like.new_ones(z.shape[1]) if scale is None else scale
    return ones, like.new_zeros(z.shape[1]) if shift is None else shift


def dense_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    z = _convolved(x, weight, (stride, padding, dilation))
    return scale_shift_act(z, *_channels(z, scale, shift), residual, activation)


def dense_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> tuple[Tensor, ...]:
    how = stride, padding, dilation
    z = _convolved(x, weight, how)
    grad_z, grad_scale, grad_shift, grad_residual = scale_shift_act_backward(
        grad, z, *_channels(z, scale, shift), residual, activation
    )
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_z, x, weight.to(x.dtype), None, *how, False, [0, 0], 1, [True, True, False]
    )
    none = x.new_empty(0)
    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return (
        _like(grad_x, x),
        dense.copy_(grad_weight),
        none if scale is None else grad_scale,
        none if shift is None else grad_shift,
        grad_residual,
    )
