from __future__ import annotations

from typing import Any

from torch import nn

from convblocks.blocks.inception import InceptionBranches


def _mean() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class InceptionV4A(InceptionBranches):
    """Inception v4's module of 35 x 35 maps: 1x1, 3x3 and two 3x3 convolutions and a mean side by side.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 384, H, W).

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV4A(384)(torch.randn(2, 384, 35, 35))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(
            in_channels,
            {"branch0": (96, 1)},
            {"branch1": [(64, 1), (96, 3)]},
            {"branch2": [(64, 1), (96, 3), (96, 3)]},
            {"branch3": [_mean(), (96, 1)]},
            **options,
        )


class InceptionV4B(InceptionBranches):
    """Inception v4's module of 17 x 17 maps: 1x7 and 7x1 convolutions, in turn.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 1024, H, W).

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV4B(1024)(torch.randn(2, 1024, 17, 17))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(
            in_channels,
            {"branch0": (384, 1)},
            {"branch1": [(192, 1), (224, (1, 7)), (256, (7, 1))]},
            {"branch2": [(192, 1), (192, (7, 1)), (224, (1, 7)), (224, (7, 1)), (256, (1, 7))]},
            {"branch3": [_mean(), (128, 1)]},
            **options,
        )


class InceptionV4C(InceptionBranches):
    """Inception v4's module of 8 x 8 maps, whose branches end in a 1x3 and a 3x1 convolution side by side.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 1536, H, W).

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV4C(1536)(torch.randn(2, 1536, 8, 8))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        fork = ((256, (1, 3)), (256, (3, 1)))
        super().__init__(
            in_channels,
            {"branch0": (256, 1)},
            {"branch1_0": (384, 1), ("branch1_1a", "branch1_1b"): fork},
            {
                "branch2_0": (384, 1),
                "branch2_1": (448, (3, 1)),
                "branch2_2": (512, (1, 3)),
                ("branch2_3a", "branch2_3b"): fork,
            },
            {"branch3": [_mean(), (256, 1)]},
            **options,
        )


class InceptionReductionA(InceptionBranches):
    """The module from 35 x 35 to 17 x 17 maps of Inception v4 and of the Inception-ResNets.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        in_channels: of the input.
        channels: k, l, m and n of the paper: of the 1x1, 3x3 and 3x3 convolutions of one branch, and of the only one of
            another: 192, 224, 256, 384 in Inception v4, 192, 192, 256, 384 in Inception-ResNet v1, 256, 256, 384, 384
            in v2.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, m + n + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down.

    Raises:
        ValueError: channels that are no positive integers, an unknown attention.

    Example:
        >>> y = convblocks.InceptionReductionA(384, (192, 224, 256, 384))(torch.randn(2, 384, 35, 35))
    """

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int], **options: Any) -> None:
        reduced, middle, out, alone = channels
        super().__init__(
            in_channels,
            {"branch0": (alone, 3, 2)},
            {"branch1": [(reduced, 1), (middle, 3), (out, 3, 2)]},
            {"branch2": nn.MaxPool2d(3, 2)},
            **options,
        )


class InceptionV4ReductionB(InceptionBranches):
    """Inception v4's module from 17 x 17 to 8 x 8 maps.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 512 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down.

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV4ReductionB(1024)(torch.randn(2, 1024, 17, 17))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(
            in_channels,
            {"branch0": [(192, 1), (192, 3, 2)]},
            {"branch1": [(256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2)]},
            {"branch2": nn.MaxPool2d(3, 2)},
            **options,
        )
