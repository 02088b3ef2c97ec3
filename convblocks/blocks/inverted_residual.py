from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, make_divisible, positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.branch import Branch
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.squeeze_excite import SqueezeExcite


class SkipBlock(nn.Module):
    """Base of blocks ``x + drop_path(branch(x))`` without an activation after the sum.

    Attributes:
        branch: the name of the branch among its layers.
        stride: of the block.
        skip: whether the input is added.
        adds: whether the branch can add it, in its last norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel_size: int, drop: float) -> None:
        super().__init__()
        name = type(self).__name__
        positive(name, "in_channels", in_channels)
        positive(name, "out_channels", out_channels)
        if stride not in (1, 2):
            raise ValueError(f"{name}: expected a stride of 1 or 2, got {stride}")
        if positive(name, "kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"{name}: expected an odd kernel_size, got {kernel_size}")
        self.stride, self.skip = stride, stride == 1 and in_channels == out_channels
        self.drop_path = check_drop_path(name, drop)
        self.branch, self.adds = "block", True

    def forward(self, x: Tensor) -> Tensor:
        branch = self._modules[self.branch]
        assert branch is not None
        if self.skip and self.adds and (self.drop_path == 0 or not self.training):
            added: Tensor = branch(x, x)
            return added
        y: Tensor = branch(x)
        return drop_path(y, self.drop_path, self.training) + x if self.skip else y

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}" if self.drop_path else ""


def _squeeze_excite(channels: int) -> nn.Module:
    return SqueezeExcite(channels, make_divisible(channels // 4), gate_layer="hardsigmoid")


class InvertedResidual(SkipBlock):
    """MobileNet's block: more channels, a depthwise convolution, then few channels again, without an activation.

    ``x + project(se(depthwise(expand(x))))``, each with a norm; x is added where stride and channels allow. Sandler et
    al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381; with squeeze-excite, Howard et al.,
    "Searching for MobileNetV3", arXiv 1905.02244. The keys of the state dict are those of torchvision.

    Args:
        in_channels, out_channels: of the input and of the result.
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: the depthwise convolution has round(in_channels * expand_ratio) channels; there is no layer that
            expands where these are in_channels.
        expanded_channels: how many it has, where that is no such multiple.
        kernel_size: of the depthwise convolution, odd.
        activation: a name, a module, or a class or partial that makes one.
        attention: after the depthwise convolution: a name ("se": as MobileNetV3's, with a quarter of the channels and
            hardsigmoid), what makes a module for C channels, or None.
        eps, momentum: of the norms.
        drop_path: the probability with which a sample skips the block in training.
        keys: "v2", as in MobileNetV2: ``conv.N``, and ``conv.se`` for attention; or "v3", as in MobileNetV3 and
            EfficientNet: ``block.N``.
        device, dtype: of the parameters but those of attention.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range, an unknown activation, attention or keys.

    Example:
        >>> y = convblocks.InvertedResidual(32, 64, stride=2)(torch.randn(2, 32, 28, 28))
        >>> v3 = convblocks.InvertedResidual(40, 40, kernel_size=5, activation="hardswish", attention="se", keys="v3")
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 6,
        *,
        expanded_channels: int | None = None,
        kernel_size: int = 3,
        activation: Layer = "relu6",
        attention: Attention = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        drop_path: float = 0.0,
        keys: str = "v2",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, kernel_size, drop_path)
        name = type(self).__name__
        width = round(in_channels * expand_ratio) if expanded_channels is None else expanded_channels
        positive(name, "the expanded channels", width)
        if keys not in ("v2", "v3"):
            raise ValueError(f"{name}: expected keys to be one of v2, v3, got {keys}")
        conv = partial(ConvNormAct, eps=eps, momentum=momentum, names=("0", "1"), device=device, dtype=dtype)
        layers: list[nn.Module] = []
        if width != in_channels:
            layers.append(conv(in_channels, width, 1, activation=activation))
        layers.append(conv(width, width, kernel_size, stride, groups=width, activation=activation))
        se = attention_layer(name, _squeeze_excite if attention == "se" else attention, width)
        project = conv(width, out_channels, 1, activation="none")
        if keys == "v2":
            self.branch = "conv"
            named = [(str(i), layer) for i, layer in enumerate((*layers, *project))]
            named[-2:-2] = [] if se is None else [("se", se)]
            self.conv = Branch(OrderedDict(named))
        else:
            self.block = Branch(*layers, *([] if se is None else [se]), Branch(*project))


def _expanded(block: str, in_channels: int, expand_ratio: float) -> int:
    """As EfficientNet rounds."""
    if not expand_ratio > 0:
        raise ValueError(f"{block}: expected a positive expand_ratio, got {expand_ratio}")
    return make_divisible(positive(block, "in_channels", in_channels) * expand_ratio)


class MBConv(InvertedResidual):
    """EfficientNet's block: MobileNetV2's with squeeze-excite and SiLU.

    Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946. The keys
    of the state dict are those of torchvision.

    Args:
        in_channels, out_channels: of the input and of the result.
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: the depthwise convolution has in_channels * expand_ratio channels, rounded to a multiple of 8;
            there is no layer that expands where these are in_channels.
        kernel_size: of the depthwise convolution, odd.
        attention: after the depthwise convolution: a name ("se": as published, with a quarter of in_channels and SiLU),
            what makes a module for C channels, or None.
        eps, momentum: of the norms.
        drop_path: the probability with which a sample skips the block in training.
        device, dtype: of the parameters but those of attention.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> y = convblocks.MBConv(64, 128, stride=2)(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 4,
        *,
        kernel_size: int = 3,
        attention: Attention = "se",
        eps: float = 1e-3,
        momentum: float = 0.1,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = _expanded("MBConv", in_channels, expand_ratio)
        if attention == "se":
            attention = partial(SqueezeExcite, squeeze_channels=max(1, in_channels // 4), act_layer="silu")
        super().__init__(
            in_channels,
            out_channels,
            stride,
            expanded_channels=width,
            kernel_size=kernel_size,
            activation="silu",
            attention=attention,
            eps=eps,
            momentum=momentum,
            drop_path=drop_path,
            keys="v3",
            device=device,
            dtype=dtype,
        )


class FusedMBConv(SkipBlock):
    """EfficientNetV2's block of the first stages: one dense convolution instead of MBConv's first two.

    ``x + project(conv(x))``, each with a norm, the first with SiLU; without an expansion, ``x + conv(x)``. Tan and Le,
    "EfficientNetV2: Smaller Models and Faster Training", arXiv 2104.00298. The keys of the state dict are those of
    torchvision.

    Args:
        in_channels, out_channels: of the input and of the result.
        stride: of the first convolution, 1 or 2.
        expand_ratio: that has in_channels * expand_ratio channels, rounded to a multiple of 8. Where these are
            in_channels it is the only one.
        kernel_size: of the first convolution, odd.
        eps, momentum: of the norms.
        drop_path: the probability with which a sample skips the block in training.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> y = convblocks.FusedMBConv(24, 48, stride=2)(torch.randn(2, 24, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 4,
        *,
        kernel_size: int = 3,
        eps: float = 1e-3,
        momentum: float = 0.1,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, kernel_size, drop_path)
        conv = partial(ConvNormAct, eps=eps, momentum=momentum, names=("0", "1"), device=device, dtype=dtype)
        width = _expanded("FusedMBConv", in_channels, expand_ratio)
        self.adds = width != in_channels
        if self.adds:
            expand = conv(in_channels, width, kernel_size, stride, activation="silu")
            project = conv(width, out_channels, 1, activation="none")
            self.block: nn.Module = Branch(expand, Branch(*project))
        else:
            self.block = nn.Sequential(conv(in_channels, out_channels, kernel_size, stride, activation="silu"))
