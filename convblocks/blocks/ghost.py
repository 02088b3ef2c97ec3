from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, make_divisible, positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import Layers, Room, convolve, run_into
from convblocks.blocks.squeeze_excite import SqueezeExcite

_SE = partial(SqueezeExcite, rd_ratio=1 / 4, rd_round_fn=partial(make_divisible, divisor=4), gate_layer="hardsigmoid")


class GhostModule(nn.Module):
    """Ghost module: a convolution makes some of the channels, a cheap depthwise one makes the others of those.

    ``x1 = act(bn(conv(x))); y = cat(x1, act(bn(depthwise(x1))))``. Han et al., "GhostNet: More Features from Cheap
    Operations", arXiv 1911.11907. With ``decoupled`` also GhostNetV2's attention over a row and a column, at half the
    size: ``y * upsample(sigmoid(short_conv(avg_pool(x))))``; Tang et al., "GhostNetV2: Enhance Cheap Operation with
    Long-Range Attention", arXiv 2211.12905.

    The keys of the state dict (``primary_conv``, ``cheap_operation``, ``short_conv``) are those of the authors and of
    timm.

    Args:
        in_channels, out_channels: of the input and of the result.
        kernel_size, stride: of the convolution, whose kernel is odd.
        ratio: one of so many channels is made by the convolution; at least 2. What is too much is cut off.
        dw_size: kernel of the depthwise convolution, odd.
        activation: a name, a module, or a class or partial that makes one; "none": nothing.
        decoupled: whether there is GhostNetV2's attention; its image needs at least 2 x 2 pixels.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: channels that are no positive integers, a ratio below 2, an even kernel, an unknown activation.

    Example:
        >>> y = convblocks.GhostModule(16, 48)(torch.randn(2, 16, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        *,
        activation: Layer = "relu",
        decoupled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GhostModule"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        if positive(name, "ratio", ratio) < 2:
            raise ValueError(f"{name}: expected a ratio of at least 2, got {ratio}")
        for what, kernel in (("kernel_size", kernel_size), ("dw_size", dw_size)):
            if positive(name, what, kernel) % 2 == 0:
                raise ValueError(f"{name}: expected an odd {what}, got {kernel}")
        first = math.ceil(out / ratio)
        self.first, self.kept = first, out - first  # of the cheap channels
        self.strideless = stride == 1
        conv = partial(ConvNormAct, names=("0", "1"), activation=activation, device=device, dtype=dtype)
        self.primary_conv = conv(c, first, kernel_size, stride)
        self.cheap_operation = conv(first, first * (ratio - 1), dw_size, groups=first)
        self.short_conv: nn.Module | None = None
        if decoupled:
            linear = partial(ConvNormAct, activation="none", device=device, dtype=dtype)
            self.short_conv = Layers(
                *linear(c, out, kernel_size, stride),
                *linear(out, out, (1, 5), groups=out),
                *linear(out, out, (5, 1), groups=out),
            )

    def forward(self, x: Tensor) -> Tensor:
        room = Room(x if self.strideless else None, (self.first, self.kept))
        x1 = run_into(self.primary_conv, x, room.parts[0])
        y = room.filled((x1, self.cheap_operation(x1)[:, : self.kept]))
        if self.short_conv is None:
            return y
        gate = torch.sigmoid(self.short_conv(F.avg_pool2d(x, 2, 2)))
        return y * F.interpolate(gate, size=y.shape[2:], mode="nearest")


class GhostBottleneck(nn.Module):
    """GhostNet's block: a Ghost module that expands, perhaps a strided depthwise convolution, attention, and a linear
    Ghost module.

    ``ghost2(se(bn_dw(conv_dw(ghost1(x))))) + shortcut(x)``. Han et al., "GhostNet: More Features from Cheap
    Operations", arXiv 1911.11907. The keys of the state dict are those of the authors and of timm, but for the two
    layers of the squeeze-excite, which ``convert_state_dict`` reads.

    Args:
        in_channels: of the input.
        mid_channels: between the two modules.
        out_channels: of the result.
        kernel_size: of the depthwise convolutions of a strided block and of a shortcut, odd.
        stride: 1 or more; without one the strided convolution is left out.
        attention: before the second module: a name ("eca", "cbam", ...), what makes a module for C channels, or None.
            "se": GhostNet's own, a quarter of the channels and hardsigmoid.
        decoupled: of the first module, GhostNetV2's attention.
        drop_path: the probability with which a sample skips the block in training.
        device, dtype: of the parameters, but for those of the attention.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> y = convblocks.GhostBottleneck(24, 72, 40, 5, stride=2, attention="se")(torch.randn(2, 24, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        attention: Attention = None,
        decoupled: bool = False,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GhostBottleneck"
        c, mid, out = (
            positive(name, what, value)
            for what, value in (
                ("in_channels", in_channels),
                ("mid_channels", mid_channels),
                ("out_channels", out_channels),
            )
        )
        if positive(name, "kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"{name}: expected an odd kernel_size, got {kernel_size}")
        positive(name, "stride", stride)
        self.drop_path = check_drop_path(name, drop_path)
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ghost1 = GhostModule(c, mid, decoupled=decoupled, **own)
        self.chains: tuple[tuple[str, str], ...] = ()
        if stride > 1:
            self.conv_dw = DepthwiseConv2d(mid, mid, kernel_size, stride, kernel_size // 2, bias=False, **own)
            self.bn_dw = BatchNormAct2d(mid, inplace=True, **own)
            self.chains = (("conv_dw", "bn_dw"),)
        self.se = attention_layer(name, _SE if attention == "se" else attention, mid)
        self.ghost2 = GhostModule(mid, out, activation="none", **own)
        self.shortcut = Layers()
        if stride > 1 or c != out:
            depthwise = ConvNormAct(c, c, kernel_size, stride, groups=c, activation="none", **own)
            self.shortcut = Layers(*depthwise, *ConvNormAct(c, out, 1, activation="none", **own))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.chains:
            y = convolve(self.conv_dw, y, self.bn_dw)
        y = y if self.se is None else self.se(y)
        shortcut: Tensor = self.shortcut(x)
        return drop_path(self.ghost2(y), self.drop_path, self.training) + shortcut
