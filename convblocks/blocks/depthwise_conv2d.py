from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name
from convblocks.ops.depthwise_conv2d import depthwise_conv2d, four, operator, pair
from convblocks.ops.gate import ACTIVATIONS

Pair = int | tuple[int, int]


def padding_of(conv: Any, x: Tensor, same: bool) -> Sequence[int]:
    """Left, right, top and bottom."""
    if same:
        return four("same", x, conv.weight, conv.stride, conv.dilation)
    if isinstance(conv.padding, str):
        both: list[int] = conv._reversed_padding_repeated_twice
        return both
    sides = pair(conv.padding)  # as torch takes it, of one number, too
    return sides[-1], sides[-1], sides[0], sides[0]


def fused_forward(same: bool, run: Callable[..., Tensor] = operator) -> Callable[[Any, Tensor], Tensor]:
    """A forward of an ``nn.Conv2d`` that is depthwise; ``same`` pads as TensorFlow does, whatever its padding says.

    Everything is read from the module at each call, as ``nn.Conv2d`` reads it.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        p = self._parameters
        if "weight" not in p or "bias" not in p:  # they are computed: pruned, weight norm
            return self.unfused(x)  # type: ignore[no-any-return]
        weight, bias = p["weight"], p["bias"]
        if isinstance(x, torch.fx.Proxy):  # a name in a graph: neither its size nor its dtype is known
            if same:
                return self.unfused(x)
        elif x.dim() != 4 or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
            return self.unfused(x)  # type: ignore[no-any-return]
        return run(x, weight, bias, self.stride, padding_of(self, x, same), self.dilation, "none")

    return forward


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution: ``nn.Conv2d`` with one group for each channel of the input, and an activation in its pass.

    One operation (``convblocks.ops.depthwise_conv2d``). It takes what ``nn.Conv2d`` takes, has its keys in the state
    dict (``weight``, ``bias``) and its initialisation, and is an instance of it. Howard et al., "MobileNets: Efficient
    Convolutional Neural Networks for Mobile Vision Applications", arXiv 1704.04861.

    Args:
        in_channels: channels C of the input.
        out_channels: C, or a multiple of it; C when left out.
        kernel_size, stride, dilation: one number, or two for height and width.
        padding: one number, two, or "same" or "valid"; "same" with a stride as TensorFlow pads.
        groups: C; when left out, too.
        bias, padding_mode, device, dtype: as in ``nn.Conv2d``.
        activation: a name, a module, or a class or partial that makes one: relu, relu6, silu, gelu, gelu_tanh,
            hardswish, leaky_relu (slope 0.01) or none.

    Shape: (N, C, H, W) or (C, H, W) to (N, out_channels, H', W') or without N; float32, float64, float16 or bfloat16,
    in x's memory format.

    Raises:
        ValueError: groups other than in_channels, out_channels that are no multiple of it, an unknown activation.

    Example:
        >>> conv = convblocks.DepthwiseConv2d(32, kernel_size=3, padding=1, activation="relu6")
        >>> y = conv(torch.randn(2, 32, 56, 56))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Layer = "none",
    ) -> None:
        if groups not in (None, in_channels):
            raise ValueError(f"DepthwiseConv2d: expected groups to be in_channels, {in_channels}, got {groups}")
        self.same = padding == "same" and stride not in (1, (1, 1))  # which nn.Conv2d refuses
        super().__init__(
            in_channels,
            in_channels if out_channels is None else out_channels,
            kernel_size,
            stride,
            0 if self.same else padding,
            dilation,
            in_channels,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if self.same and padding_mode != "zeros":
            raise ValueError(f"DepthwiseConv2d: expected padding_mode zeros for padding same, got {padding_mode}")
        self.activation_name = function_name("DepthwiseConv2d", "activation", activation, ACTIVATIONS)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        single = not isinstance(input, torch.fx.Proxy) and input.dim() == 3
        x, padding = (input[None] if single else input), "same" if self.same else self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), (0, 0)
        y = depthwise_conv2d(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            activation=self.activation_name,
        )
        return y[0] if single else y

    def extra_repr(self) -> str:
        words: str = super().extra_repr()  # type: ignore[no-untyped-call]
        words += ", padding=same" if self.same else ""
        return words if self.activation_name == "none" else f"{words}, activation={self.activation_name}"
