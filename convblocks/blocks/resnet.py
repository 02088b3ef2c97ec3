from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import convolve


class ResidualBlock(nn.Module):
    """Base of blocks ``relu(drop_path(se(branch(x))) + shortcut(x))`` whose branch ends in a norm."""

    expansion: ClassVar[int] = 1

    downsample: nn.Module | None

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop_path = check_drop_path(type(self).__name__, drop)
        self.se: nn.Module | None = None
        self.middle: nn.Module | None = None

    @property
    def chains(self) -> tuple[tuple[str, str], ...]:
        """Convolutions and the norms that see nothing but what they make."""
        pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(self, f"conv{i}")]
        return tuple(pairs if self.middle is None else pairs[:1] + pairs[2:])

    def place(self, attention: Attention, at: str, end: int, middle: int) -> None:
        """Puts attention at one of two places that have so many channels."""
        name = type(self).__name__
        if at not in ("end", "middle"):
            raise ValueError(f"{name}: expected attention_at to be one of end, middle, got {at}")
        if at == "end":
            self.se = attention_layer(name, attention, end)
        else:
            self.middle = attention_layer(name, attention, middle)

    def last_norm(self, channels: int) -> BatchNormAct2d:
        """That of the branch; it ends the block where nothing stands between."""
        alone = self.se is None and self.drop_path == 0
        return BatchNormAct2d(channels, "relu" if alone else "none", inplace=True)

    def attended(self, conv: nn.Module, y: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
        """``norm(conv(y), residual)``, with the attention that stands between."""
        if self.middle is None:
            return convolve(conv, y, norm, residual)
        y = self.middle(conv(y))
        normed: Tensor = norm(y) if residual is None else norm(y, residual)
        return normed

    def end(self, last: Callable[..., Tensor], conv: nn.Module, y: Tensor, norm: nn.Module, x: Tensor) -> Tensor:
        """From what the last convolution is given and the block's input to its output; ``last`` is ``convolve`` or like
        it."""
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        if isinstance(norm, BatchNormAct2d):
            alone = self.se is None and self.drop_path == 0
            if norm.activation_name != ("relu" if alone else "none"):  # attention or drop path were set since
                norm.activation_name = "relu" if alone else "none"
            if alone:
                return last(conv, y, norm, shortcut)
        y = last(conv, y, norm)
        y = y if self.se is None else self.se(y)
        return F.relu(drop_path(y, self.drop_path, self.training) + shortcut, inplace=True)


class BasicBlock(ResidualBlock):
    """ResNet's block of two 3x3 convolutions.

    ``relu(se(bn2(conv2(relu(bn1(conv1(x)))))) + downsample(x))``. He et al., "Deep Residual Learning for Image
    Recognition", arXiv 1512.03385. The keys of the state dict are those of torchvision and timm.

    Args:
        in_channels: of the input.
        planes: channels of the convolutions and of the result.
        stride: of the first convolution.
        downsample: makes the shortcut fit where stride or channels change; None: the input itself.
        dilation: of the second convolution; ``first_dilation`` that of the first.
        attention: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or None.
        attention_at: "end": after the last norm; "middle": before it (SimAM's networks).
        drop_path: the probability with which a sample skips the block in training.

    Shape: (N, in_channels, H, W) to (N, planes, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> y = convblocks.BasicBlock(64, 64, attention="eca")(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        dilation: int = 1,
        first_dilation: int | None = None,
        attention: Attention = None,
        attention_at: str = "end",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(drop_path)
        name = type(self).__name__
        c, out = positive(name, "in_channels", in_channels), positive(name, "planes", planes)
        first = dilation if first_dilation is None else first_dilation
        self.conv1 = nn.Conv2d(c, out, 3, stride, first, first, bias=False)
        self.bn1 = BatchNormAct2d(out, "relu", inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, dilation, dilation, bias=False)
        self.place(attention, attention_at, out, out)
        self.bn2 = self.last_norm(out)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.conv1, x, self.bn1)
        return self.end(self.attended, self.conv2, y, self.bn2, x)


class Bottleneck(ResidualBlock):
    """ResNet's block of a 1x1, a 3x3 and a 1x1 convolution; with groups that of ResNeXt.

    ``relu(se(bn3(conv3(...))) + downsample(x))``. He et al., "Deep Residual Learning for Image Recognition",
    arXiv 1512.03385; Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", arXiv 1611.05431. The
    keys of the state dict are those of torchvision and timm.

    Args:
        in_channels: of the input.
        planes: the inner convolutions have int(planes * base_width / 64) * groups channels, the result 4 * planes.
        stride: of the 3x3 convolution; of the first 1x1 one with ``stride_first`` (the paper's; torchvision's v1.5
            moved it).
        downsample: makes the shortcut fit where stride or channels change; None: the input itself.
        groups, base_width: of the 3x3 convolution.
        dilation: of the 3x3 convolution; ``first_dilation`` goes before it.
        attention: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or None.
        attention_at: "end": after the last norm; "middle": between the 3x3 convolution and its norm (SimAM's networks).
        drop_path: the probability with which a sample skips the block in training.

    Shape: (N, in_channels, H, W) to (N, 4 * planes, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> y = convblocks.Bottleneck(256, 64, attention="se")(torch.randn(2, 256, 28, 28))
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        first_dilation: int | None = None,
        stride_first: bool = False,
        attention: Attention = None,
        attention_at: str = "end",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(drop_path)
        name = type(self).__name__
        c, out = positive(name, "in_channels", in_channels), positive(name, "planes", planes) * self.expansion
        width = positive(name, "the width", int(planes * base_width / 64)) * positive(name, "groups", groups)
        d = dilation if first_dilation is None else first_dilation
        first, second = (stride, 1) if stride_first else (1, stride)
        self.conv1 = nn.Conv2d(c, width, 1, first, bias=False)
        self.bn1 = BatchNormAct2d(width, "relu", inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, second, d, d, groups, bias=False)
        self.bn2 = BatchNormAct2d(width, "relu", inplace=True)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.place(attention, attention_at, out, width)
        self.bn3 = self.last_norm(out)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.attended(self.conv2, convolve(self.conv1, x, self.bn1), self.bn2)
        return self.end(convolve, self.conv3, y, self.bn3, x)
