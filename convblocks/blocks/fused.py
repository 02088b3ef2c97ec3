"""Convolutions with what follows them, which inference computes as one operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from convblocks import backends
from convblocks.blocks.batch_norm_act import INPLACE, BatchNormAct2d
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d, padding_of
from convblocks.blocks.layers import is_plain
from convblocks.blocks.sync_batch_norm import SyncBatchNorm2d, SyncBatchNormAct2d
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
        and x.layout is torch.strided
        and backends.extension_error is None
        and backends.selected in ("auto", "cpu")
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
    out: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv(x)) + residual)``; a norm of ours adds the residual itself and ends in its own activation.

    One operation where it is inference on the CPU and the layers do no more than their classes do. ``out``, part of a
    ``Room``, is then where the result is.
    """
    y = _as_one(conv, x, norm, residual, activation, out) if runs_alone(x) else None
    if y is not None:
        return y
    y = conv(x)
    if isinstance(norm, BatchNormAct2d):
        normed: Tensor = norm(y) if residual is None else norm(y, residual)
        return normed
    y = y if norm is None else norm(y)
    y = y if residual is None else y + residual
    return y if activation == "none" else INPLACE.get(activation, ACTIVATIONS[activation])(y)


def _is_pair(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2


def _as_one(
    conv: Any, x: Tensor, norm: Any, residual: Tensor | None, activation: str, out: Tensor | None
) -> Tensor | None:
    own = type(conv) is DepthwiseConv2d
    parameters = conv._parameters
    if not (is_plain(conv, DepthwiseConv2d if own else nn.Conv2d) and parameters.keys() >= _PARAMETERS):
        return None  # pruned, weight norm: they are computed
    weight, bias = parameters["weight"], parameters["bias"]
    if type(weight) is not nn.Parameter or conv.padding_mode != "zeros":
        return None
    if not (_is_pair(conv.stride) and _is_pair(conv.dilation)):
        return None
    mean = var = gamma = beta = None
    eps, after = 0.0, activation
    if norm is not None:
        own_norm = is_plain(norm, BatchNormAct2d) or is_plain(norm, SyncBatchNormAct2d)
        plain = own_norm or is_plain(norm, nn.BatchNorm2d) or is_plain(norm, SyncBatchNorm2d)
        if not plain or norm.training or norm.running_mean is None:
            return None
        if not norm._parameters.keys() >= _PARAMETERS:
            return None
        mean, var, eps = norm.running_mean, norm.running_var, norm.eps
        gamma, beta = norm._parameters["weight"], norm._parameters["bias"]
        after = norm.function if own_norm else activation
    fused = after if after in _CHEAP else "none"
    if own:
        if norm is None or residual is not None or conv.activation_name != "none":
            return None
        padding = padding_of(conv, x, conv.same)
    elif conv.groups > 1 or not _is_pair(conv.padding):
        return None
    else:
        padding = conv.padding
    norms = (mean, var, gamma, beta, eps)
    y: Tensor | None = torch.ops.convblocks._conv_norm(
        x, weight, bias, *norms, residual, out, conv.stride, padding, conv.dilation, fused
    )
    if y is None or fused == after:
        return y
    ended: Tensor = norm.end(y) if after is None else INPLACE.get(after, ACTIVATIONS[after])(y)
    return ended


def put(y: Tensor, part: Tensor) -> None:
    """Makes part hold y, of its size, which may lie there or overlap it."""
    if y.data_ptr() != part.data_ptr() or y.stride() != part.stride():
        shared = y.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        part.copy_(y.clone() if shared else y)


class Room:
    """One map for several side by side, where inference on the CPU writes them; elsewhere they are concatenated."""

    def __init__(self, x: Tensor | None, channels: Sequence[int]) -> None:
        """For maps of so many channels, of the size and in the memory format of x; there is none without x."""
        self.whole: Tensor | None = None
        self.parts: Sequence[Tensor | None] = [None] * len(channels)
        if x is not None and runs_alone(x):
            n, _, h, w = x.shape
            last = memory_format(x) == torch.channels_last
            c = sum(channels)
            self.whole = x.new_empty(n, h, w, c).permute(0, 3, 1, 2) if last else x.new_empty(n, c, h, w)
            self.parts = self.whole.split(list(channels), 1)

    def filled(self, maps: Sequence[Tensor]) -> Tensor:
        """All maps, which are computed with ``out=room.parts[i]`` or else anywhere."""
        parts = [part for part in self.parts if part is not None]
        if self.whole is None or [(y.shape, y.dtype) for y in maps] != [(p.shape, p.dtype) for p in parts]:
            return torch.cat(list(maps), 1)
        for part, y in zip(parts, maps, strict=True):
            put(y, part)
        return self.whole


def run_layers(layers: Iterable[nn.Module], x: Any, residual: Tensor | None = None, out: Tensor | None = None) -> Any:
    """The layers in turn, convolutions with what follows them.

    The last one, a norm, a convolution or a branch, adds the residual. ``out``, part of a ``Room``, is where the result
    may be.
    """
    row = list(layers)
    while row:
        layer, *row = row
        if is_plain(layer, Layers):
            row = [*cast(Layers, layer), *row]
            continue
        after = row[0] if row and isinstance(layer, nn.Conv2d) else None
        if isinstance(after, nn.BatchNorm2d):
            row = row[1:]
            x = convolve(layer, x, after, None if row else residual, out=None if row else out)
        elif is_plain(after, nn.ReLU) and runs_alone(x):
            row = row[1:]
            x = convolve(layer, x, activation="relu", out=None if row else out)
        elif isinstance(layer, nn.Conv2d):
            x = convolve(layer, x, None, None if row else residual, out=None if row else out)
        else:
            x = layer(x) if row or residual is None else layer(x, residual)
    return x


def run_into(layer: nn.Module, x: Tensor, out: Tensor | None) -> Tensor:
    """``layer(x)``, in ``out`` if it is a row of layers that can write there."""
    if isinstance(layer, Layers) and type(layer).forward is Layers.forward and is_plain(layer, type(layer)):
        y: Tensor = run_layers(layer, x, out=out)
    else:
        y = layer(x)
    return y


class Layers(nn.Sequential):
    """An ``nn.Sequential`` that computes convolutions with what follows them."""

    def forward(self, input: Any) -> Any:
        return run_layers(self, input)
