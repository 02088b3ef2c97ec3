from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.depthwise_conv2d import Pair
from convblocks.blocks.fused import Room, run_into

# By the names of one layer or of two; what stands for a layer is said below.
Branch = Mapping[str | tuple[str, str], Any]


def inception_conv(
    in_channels: int, out_channels: int, kernel: Pair, stride: int = 1, padding: int | None = None, *, eps: float
) -> ConvNormAct:
    """Unpadded if it has a stride; of unchanged size if not, unless a padding says otherwise."""
    if padding is None and stride > 1:
        padding = 0
    return ConvNormAct(in_channels, out_channels, kernel, stride, padding, eps=eps)


class InceptionBranches(nn.Module):
    """Branches of convolutions and pools that see the same map; what comes of them is concatenated.

    ``se(concat(branch(x) for each branch))``: the base of Inception's modules, each of which is a table of branches.
    Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842. A convolution has a norm and a ReLU after it.

    Args:
        in_channels: of the input.
        *branches: of each, the layers in turn, by their names in the keys of the state dict. A layer is a convolution,
            (channels, kernel), (channels, kernel, stride) or (channels, kernel, stride, padding), without padding if
            it has a stride and of unchanged size if not; a module that keeps the channels, such as a pool; or a list
            of these. Two names, with two layers, fork: they end the branch with the results of both.
        attention: after the concatenation: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C
            channels, or None.
        norm_eps: of the norms.

    Attributes:
        out_channels: of the result.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').

    Raises:
        ValueError: channels that are no positive integers, an unknown attention.

    Example:
        >>> stem = convblocks.InceptionBranches(64, {"pool": torch.nn.MaxPool2d(3, 2)}, {"conv": (96, 3, 2)})
        >>> y = stem(torch.randn(2, 64, 73, 73))
    """

    def __init__(
        self, in_channels: int, *branches: Branch, attention: Attention = None, norm_eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.in_channels = positive(self.name, "in_channels", in_channels)
        self.norm_eps = norm_eps
        self.branches: list[list[tuple[str, ...]]] = []
        self.widths: list[int] = []  # of what is concatenated
        self.out_channels = 0
        for branch in branches:
            channels, path = in_channels, []
            widths: list[int] = []
            for names, steps in branch.items():
                forks = ((names, steps),) if isinstance(names, str) else tuple(zip(names, steps, strict=True))
                widths = [self._add(name, channels, step) for name, step in forks]
                channels = sum(widths)
                path.append(tuple(name for name, _ in forks))
            self.branches.append(path)
            self.widths += widths
            self.out_channels += channels
        self.se = attention_layer(self.name, attention, self.attended())

    def attended(self) -> int:
        """The channels that the attention sees."""
        return self.out_channels

    def _add(self, name: str, channels: int, steps: Any) -> int:
        """Adds layers under one name; returns how many channels come of them."""
        layers: list[nn.Module] = []
        for step in steps if isinstance(steps, list) else [steps]:
            if isinstance(step, nn.Module):
                layers.append(step)
                continue
            layers.append(inception_conv(channels, *step, eps=self.norm_eps))
            channels = step[0]
        self.add_module(name, nn.Sequential(*layers) if isinstance(steps, list) else layers[0])
        return channels

    def concatenate(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        room = Room(None, self.widths)
        for branch in self.branches:
            y = x
            for (name,) in branch[:-1]:
                y = getattr(self, name)(y)
            for name in branch[-1]:
                maps.append(run_into(getattr(self, name), y, room.parts[len(maps)]))
                if len(maps) == 1:  # all are of its size
                    room = Room(maps[0], self.widths)
        return room.filled(maps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.concatenate(x)
        attended: Tensor = y if self.se is None else self.se(y)
        return attended


def _reducing_pool() -> nn.Module:
    return nn.MaxPool2d(3, 2)


def _mean(padded: bool) -> nn.Module:
    """Of 3x3 pixels; at the edge with the zeros around it, or without them."""
    return nn.AvgPool2d(3, 1, 1, count_include_pad=padded)


class InceptionV1Module(InceptionBranches):
    """GoogLeNet's module: a 1x1, a 3x3 and a larger convolution and a max pool side by side.

    Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842, with the norms of Ioffe et al., arXiv 1502.03167.
    The keys of the state dict are those of torchvision's GoogLeNet.

    Args:
        in_channels: of the input.
        c1: channels of the 1x1 convolution.
        c3_reduce, c3: of the 3x3 convolution, and of the 1x1 one before it.
        c5_reduce, c5: of the larger convolution, and of the 1x1 one before it.
        pool: of the 1x1 convolution after the pool.
        large_kernel: of the larger convolution: 5 in the paper, 3 in torchvision and its weights.
        attention: after the concatenation: a name, what makes a module for C channels, or None.
        norm_eps: of the norms.

    Shape: (N, in_channels, H, W) to (N, c1 + c3 + c5 + pool, H, W).

    Raises:
        ValueError: channels that are no positive integers, another kernel than 3 or 5, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV1Module(192, 64, 96, 128, 16, 32, 32, large_kernel=5)(torch.randn(2, 192, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        c1: int,
        c3_reduce: int,
        c3: int,
        c5_reduce: int,
        c5: int,
        pool: int,
        *,
        large_kernel: int = 3,
        attention: Attention = None,
        norm_eps: float = 1e-3,
    ) -> None:
        if large_kernel not in (3, 5):
            raise ValueError(f"InceptionV1Module: expected large_kernel to be 3 or 5, got {large_kernel}")
        super().__init__(
            in_channels,
            {"branch1": (c1, 1)},
            {"branch2": [(c3_reduce, 1), (c3, 3)]},
            {"branch3": [(c5_reduce, 1), (c5, large_kernel)]},
            {"branch4": [nn.MaxPool2d(3, 1, 1), (pool, 1)]},
            attention=attention,
            norm_eps=norm_eps,
        )


class InceptionV3A(InceptionBranches):
    """Inception v3's module of 35 x 35 maps: 1x1, 5x5 and two 3x3 convolutions and a mean side by side.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The keys of the state
    dict are those of torchvision.

    Args:
        in_channels: of the input.
        pool_channels: of the 1x1 convolution after the mean.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 224 + pool_channels, H, W).

    Raises:
        ValueError: channels that are no positive integers, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV3A(192, 32)(torch.randn(2, 192, 35, 35))
    """

    def __init__(self, in_channels: int, pool_channels: int, **options: Any) -> None:
        super().__init__(
            in_channels,
            {"branch1x1": (64, 1)},
            {"branch5x5_1": (48, 1), "branch5x5_2": (64, 5)},
            {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3)},
            {"pool": _mean(True), "branch_pool": (pool_channels, 1)},
            **options,
        )


class InceptionV3B(InceptionBranches):
    """Inception v3's module from 35 x 35 to 17 x 17 maps: convolutions with a stride, and a max pool, side by side.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The keys of the state
    dict are those of torchvision.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 480 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down.

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV3B(288)(torch.randn(2, 288, 35, 35))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(
            in_channels,
            {"branch3x3": (384, 3, 2)},
            {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3, 2)},
            {"pool": _reducing_pool()},
            **options,
        )


class InceptionV3C(InceptionBranches):
    """Inception v3's module of 17 x 17 maps: 1x7 and 7x1 convolutions, in turn.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The keys of the state
    dict are those of torchvision.

    Args:
        in_channels: of the input.
        channels_7x7: of the inner convolutions.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 768, H, W).

    Raises:
        ValueError: channels that are no positive integers, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV3C(768, 128)(torch.randn(2, 768, 17, 17))
    """

    def __init__(self, in_channels: int, channels_7x7: int, **options: Any) -> None:
        c = channels_7x7
        super().__init__(
            in_channels,
            {"branch1x1": (192, 1)},
            {"branch7x7_1": (c, 1), "branch7x7_2": (c, (1, 7)), "branch7x7_3": (192, (7, 1))},
            {
                "branch7x7dbl_1": (c, 1),
                "branch7x7dbl_2": (c, (7, 1)),
                "branch7x7dbl_3": (c, (1, 7)),
                "branch7x7dbl_4": (c, (7, 1)),
                "branch7x7dbl_5": (192, (1, 7)),
            },
            {"pool": _mean(True), "branch_pool": (192, 1)},
            **options,
        )


class InceptionV3D(InceptionBranches):
    """Inception v3's module from 17 x 17 to 8 x 8 maps.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The keys of the state
    dict are those of torchvision.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 512 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down.

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV3D(768)(torch.randn(2, 768, 17, 17))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(
            in_channels,
            {"branch3x3_1": (192, 1), "branch3x3_2": (320, 3, 2)},
            {
                "branch7x7x3_1": (192, 1),
                "branch7x7x3_2": (192, (1, 7)),
                "branch7x7x3_3": (192, (7, 1)),
                "branch7x7x3_4": (192, 3, 2),
            },
            {"pool": _reducing_pool()},
            **options,
        )


class InceptionV3E(InceptionBranches):
    """Inception v3's module of 8 x 8 maps, whose branches end in a 1x3 and a 3x1 convolution side by side.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The keys of the state
    dict are those of torchvision.

    Args:
        in_channels: of the input.
        **options: ``attention`` and ``norm_eps``, as of ``InceptionBranches``.

    Shape: (N, in_channels, H, W) to (N, 2048, H, W).

    Raises:
        ValueError: channels that are no positive integer, an unknown attention.

    Example:
        >>> y = convblocks.InceptionV3E(1280)(torch.randn(2, 1280, 8, 8))
    """

    def __init__(self, in_channels: int, **options: Any) -> None:
        fork = ((384, (1, 3)), (384, (3, 1)))
        super().__init__(
            in_channels,
            {"branch1x1": (320, 1)},
            {"branch3x3_1": (384, 1), ("branch3x3_2a", "branch3x3_2b"): fork},
            {"branch3x3dbl_1": (448, 1), "branch3x3dbl_2": (384, 3), ("branch3x3dbl_3a", "branch3x3dbl_3b"): fork},
            {"pool": _mean(True), "branch_pool": (192, 1)},
            **options,
        )
