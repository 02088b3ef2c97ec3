"""Convolutions with what follows them, which inference computes as one operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from convblocks import backends
from convblocks.blocks.batch_norm_act import INPLACE, BatchNormAct2d
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d, padding_of
from convblocks.blocks.layers import is_plain
from convblocks.ops.dense_conv2d import operator as dense
from convblocks.ops.depthwise_conv2d import operator as depthwise
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.operator import memory_format

_PARAMETERS = {"weight", "bias"}
_CHEAP = ("none", "relu", "relu6", "silu", "hardswish", "leaky_relu")  # activations that kernels have at no cost


def of_inference(x: Tensor) -> bool:
    """Whether no gradient is wanted and the layers run as they are called."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or isinstance(x, torch.fx.Proxy)
        or torch._C._functorch.maybe_current_level() is not None
        or backends.selected == "reference"
        or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    )


def runs_alone(x: Tensor) -> bool:
    """Whether inference on the CPU is all that happens to x: nothing looks on that would miss a layer."""
    return (
        of_inference(x)
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and backends.extension_error is None
        and forward_ad._current_level < 0
        and not torch._C._get_tracing_state()
        and not torch._C._len_torch_dispatch_stack()
        and not _has_any_global_hook()
    )


def arranged(x: Tensor) -> Tensor:
    """In channels_last where inference on the CPU is faster so, as it nearly always is."""
    return x.contiguous(memory_format=torch.channels_last) if runs_alone(x) else x


def restored(y: Tensor, x: Tensor) -> Tensor:
    """y, which comes of ``arranged(x)``, in the memory format of x."""
    return y.contiguous() if runs_alone(x) and memory_format(x) != torch.channels_last else y


def convolve(
    conv: nn.Module,
    x: Tensor,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(norm(conv(x)) + residual)``; a norm of ours adds the residual itself and ends in its own activation.

    One operation where it is inference on the CPU and the layers do no more than their classes do.
    """
    y = _as_one(conv, x, norm, residual, activation) if runs_alone(x) else None
    if y is not None:
        return y
    y = conv(x)
    if isinstance(norm, BatchNormAct2d):
        normed: Tensor = norm(y) if residual is None else norm(y, residual)
        return normed
    y = y if norm is None else norm(y)
    y = y if residual is None else y + residual
    return y if activation == "none" else INPLACE.get(activation, ACTIVATIONS[activation])(y)


def _scale_and_shift(norm: nn.BatchNorm2d, bias: Tensor | None) -> list[Tensor]:
    """``scale_shift``, quickly."""
    mean, var, p = norm.running_mean, norm.running_var, norm._parameters
    return list(torch.ops.convblocks._scale_and_shift(mean, var, p["weight"], p["bias"], bias, norm.eps))


def _as_one(conv: Any, x: Tensor, norm: Any, residual: Tensor | None, activation: str) -> Tensor | None:
    own = type(conv) is DepthwiseConv2d
    if not (is_plain(conv, DepthwiseConv2d if own else nn.Conv2d) and conv._parameters.keys() >= _PARAMETERS):
        return None  # pruned, weight norm: they are computed
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    if not (type(weight) is nn.Parameter and weight.dtype == x.dtype and x.shape[1] == conv.in_channels):
        return None
    scale, shift, after = None, bias, activation
    if norm is not None:
        own_norm = is_plain(norm, BatchNormAct2d)
        if not (own_norm or is_plain(norm, nn.BatchNorm2d)) or norm.training or norm.running_mean is None:
            return None
        tensors = [*norm._parameters.values(), norm.running_mean, norm.running_var, bias]
        if not (norm._parameters.keys() >= _PARAMETERS and norm.num_features == conv.out_channels):
            return None
        if not all(t is None or (t.dtype == x.dtype and t.is_cpu and t.is_contiguous()) for t in tensors):
            return None
        after = norm.function if own_norm else activation
    fused = after if after in _CHEAP else "none"
    if own:
        if norm is None or residual is not None or conv.padding_mode != "zeros" or conv.activation_name != "none":
            return None
        scale, shift = _scale_and_shift(norm, bias)
        weight, padding = weight * scale[:, None, None, None], padding_of(conv, x, conv.same)
        y: Tensor = depthwise(x, weight, shift, conv.stride, padding, conv.dilation, fused)
    else:
        if conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        if memory_format(x) != torch.channels_last:
            return None
        if norm is not None:
            scale, shift = _scale_and_shift(norm, bias)
        y = dense(x, weight, scale, shift, residual, conv.stride, conv.padding, conv.dilation, fused)
    if fused == after:
        return y
    ended: Tensor = norm.end(y) if after is None else INPLACE.get(after, ACTIVATIONS[after])(y)
    return ended


def run_layers(layers: Iterable[nn.Module], x: Any, residual: Tensor | None = None) -> Any:
    """The layers in turn, convolutions with what follows them.

    The last one, a norm, a convolution or a branch, adds the residual.
    """
    row = list(layers)
    while row:
        layer, *row = row
        if is_plain(layer, Layers):
            row = [*layer.children(), *row]
            continue
        after = row[0] if row and isinstance(layer, nn.Conv2d) else None
        if isinstance(after, nn.BatchNorm2d):
            row = row[1:]
            x = convolve(layer, x, after, None if row else residual)
        elif is_plain(after, nn.ReLU) and runs_alone(x):
            row = row[1:]
            x = convolve(layer, x, activation="relu")
        elif isinstance(layer, nn.Conv2d):
            x = convolve(layer, x, None, None if row else residual)
        else:
            x = layer(x) if row or residual is None else layer(x, residual)
    return x


class Layers(nn.Sequential):
    """An ``nn.Sequential`` that computes convolutions with what follows them."""

    def forward(self, input: Any) -> Any:
        return run_layers(self, input)
