"""Partial convolution: the convolution is torch's, the rest is that of concat_shuffle, with one group."""

from __future__ import annotations

import torch
from torch import Tensor

from convblocks.kernels.concat_shuffle import move
from convblocks.kernels.maps import is_channels_last


def _together(first: Tensor, rest: Tensor, like: Tensor) -> Tensor:
    """``first``, then the channels of ``rest`` that come after so many; laid out as ``like``."""
    memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    y = torch.empty_like(like, memory_format=memory_format)
    if y.numel():
        move([first, rest[:, first.shape[1] :]], y, 1, back=False)
    return y


def partial_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    p, padding = weight.shape[0], weight.shape[2] // 2
    return _together(torch.nn.functional.conv2d(x[:, :p], weight.to(x.dtype), padding=padding), x, x)


def partial_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    p, padding = weight.shape[0], [weight.shape[2] // 2] * 2
    grad_first, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad[:, :p], x[:, :p], weight.to(x.dtype), None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return _together(grad_first, grad, x), dense.copy_(grad_weight)
