from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.attention import Attention
from convblocks.blocks.depthwise_conv2d import Pair
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import convolve
from convblocks.blocks.inception import InceptionBranches
from convblocks.ops.scale_shift_act import operator

Widths = Sequence[Sequence[int]]


class InceptionResidual(InceptionBranches):
    """Base of Inception-ResNet's blocks: branches, a 1x1 convolution back to the channels of the input, and the input.

    ``relu(x + scale * se(conv2d(concat(branch(x) for each branch))))``. The convolution has a bias and neither norm nor
    activation. Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        in_channels: of the input and of the result.
        widths: of each branch, the channels of its convolutions. The first is 1x1; then the class says.
        scale: of what is added to the input: 0.1 to 0.3 in the paper.
        activation: whether the ReLU ends the block.
        attention: before the scale: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or
            None.
        drop_path: the probability with which a sample skips the block in training.
        norm_eps: of the norms.

    Shape: (N, in_channels, H, W) to the same.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> block = convblocks.InceptionResNetB(896, [[128], [128, 128, 128]], scale=0.1)
        >>> y = block(torch.randn(2, 896, 17, 17))
    """

    kernels: ClassVar[tuple[Pair, ...]] = (1, 3, 3)

    def __init__(
        self,
        in_channels: int,
        widths: Widths,
        scale: float = 1.0,
        *,
        activation: bool = True,
        attention: Attention = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-3,
    ) -> None:
        branches: list[dict[str | tuple[str, str], Any]] = []
        for i, own in enumerate(widths):
            if not 1 <= len(own) <= len(self.kernels):
                name, most = type(self).__name__, len(self.kernels)
                raise ValueError(f"{name}: expected 1 to {most} convolutions in a branch, got {len(own)}")
            steps = list(zip(own, self.kernels, strict=False))
            branches.append({f"branch{i}": steps if len(steps) > 1 else steps[0]})
        super().__init__(in_channels, *branches, attention=attention, norm_eps=norm_eps)
        self.conv2d = nn.Conv2d(self.out_channels, in_channels, 1)
        self.out_channels = in_channels
        self.scale, self.activation = scale, "relu" if activation else "none"
        self.drop_path = check_drop_path(self.name, drop_path)

    def attended(self) -> int:
        return self.in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self.conv2d, self.concatenate(x))
        y = y if self.se is None else self.se(y)
        mixed = not isinstance(x, torch.fx.Proxy) and x.dtype != y.dtype  # autocast began here
        if not self.training and not mixed:  # the scale, the sum and the activation in one pass
            factor = y.new_full((self.in_channels,), self.scale)
            fused: Tensor = operator(y, factor, torch.zeros_like(factor), x, self.activation)
            return fused
        y = torch.add(x, drop_path(y, self.drop_path, self.training), alpha=self.scale)
        return F.relu(y, inplace=True) if self.activation == "relu" else y

    def extra_repr(self) -> str:
        return f"scale={self.scale}, activation={self.activation}"


class InceptionResNetA(InceptionResidual):
    """Inception-ResNet's block of 35 x 35 maps, "block35", of 3x3 convolutions.

    Formula, arguments and source (arXiv 1602.07261): see ``InceptionResidual``.

    The widths of v1 are [32], [32, 32], [32, 32, 32], those of v2 [32], [32, 32], [32, 48, 64]; the scale is 0.17.

    Example:
        >>> block = convblocks.InceptionResNetA(320, [[32], [32, 32], [32, 48, 64]], scale=0.17, attention="eca")
        >>> y = block(torch.randn(2, 320, 35, 35))
    """


class InceptionResNetB(InceptionResidual):
    """Inception-ResNet's block of 17 x 17 maps, "block17", of 1x7 and 7x1 convolutions.

    Formula, arguments and source (arXiv 1602.07261): see ``InceptionResidual``.

    The widths of v1 are [128], [128, 128, 128], those of v2 [192], [128, 160, 192]; the scale is 0.1.

    Example:
        >>> block = convblocks.InceptionResNetB(1088, [[192], [128, 160, 192]], scale=0.1)
        >>> y = block(torch.randn(2, 1088, 17, 17))
    """

    kernels = (1, (1, 7), (7, 1))


class InceptionResNetC(InceptionResidual):
    """Inception-ResNet's block of 8 x 8 maps, "block8", of 1x3 and 3x1 convolutions.

    Formula, arguments and source (arXiv 1602.07261): see ``InceptionResidual``.

    The widths of v1 are [192], [192, 192, 192], those of v2 [192], [192, 224, 256]; the scale is 0.2, and 1 in the
    last, which has no activation.

    Example:
        >>> block = convblocks.InceptionResNetC(2080, [[192], [192, 224, 256]], scale=0.2)
        >>> y = block(torch.randn(2, 2080, 8, 8))
    """

    kernels = (1, (1, 3), (3, 1))


class InceptionResNetReductionB(InceptionBranches):
    """Inception-ResNet's module from 17 x 17 to 8 x 8 maps.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm. From 35 x 35 maps: ``InceptionReductionA``.

    Args:
        in_channels: of the input.
        channels: of the last convolution of the second branch and of the last two of the third: 256, 256, 256 in v1,
            288, 288, 320 in v2.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, C, (H - 1) / 2, (W - 1) / 2), rounded down, where C is 384 and in_channels and
    the first and the last of the channels.

    Raises:
        ValueError: channels that are no positive integers, an unknown attention.

    Example:
        >>> y = convblocks.InceptionResNetReductionB(896, (256, 256, 256))(torch.randn(2, 896, 17, 17))
    """

    def __init__(self, in_channels: int, channels: tuple[int, int, int], **options: Any) -> None:
        second, middle, third = channels
        super().__init__(
            in_channels,
            {"branch0": [(256, 1), (384, 3, 2)]},
            {"branch1": [(256, 1), (second, 3, 2)]},
            {"branch2": [(256, 1), (middle, 3), (third, 3, 2)]},
            {"branch3": nn.MaxPool2d(3, 2)},
            **options,
        )
