from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.channel_shuffle import ChannelShuffle
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.ops.concat_shuffle import concat_shuffle


class ShuffleNetV2Unit(nn.Module):
    """ShuffleNet V2's unit: half of the channels go through three convolutions, then all are shuffled.

    With stride 1 the other half is passed on; with stride 2 all channels go through both branches. Concatenation and
    shuffle are one operation (``convblocks.ops.concat_shuffle``). Ma et al., "ShuffleNet V2: Practical Guidelines for
    Efficient CNN Architecture Design", arXiv 1807.11164.

    The keys of the state dict (``branch1``, ``branch2``) are those of torchvision's InvertedResidual.

    Args:
        in_channels, out_channels: even numbers; the same for stride 1.
        stride: 1 to 3.
        kernel_size: of the depthwise convolutions, odd.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: channels or a stride that do not fit.

    Example:
        >>> y = convblocks.ShuffleNetV2Unit(116, 116)(torch.randn(2, 116, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "ShuffleNetV2Unit"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        if positive(name, "stride", stride) > 3:
            raise ValueError(f"{name}: expected a stride of 1 to 3, got {stride}")
        if positive(name, "kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"{name}: expected an odd kernel_size, got {kernel_size}")
        if out % 2 or (stride == 1 and c != out):
            same = f" equal to in_channels, {c}" if stride == 1 else ""
            raise ValueError(f"{name}: expected an even number of out_channels{same}, got {out}")
        self.stride = stride
        half = out // 2

        def pointwise(channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, half, 1, bias=False, device=device, dtype=dtype)
            return [conv, nn.BatchNorm2d(half, device=device, dtype=dtype), nn.ReLU(inplace=True)]

        def depthwise(channels: int) -> list[nn.Module]:
            conv = DepthwiseConv2d(
                channels, channels, kernel_size, stride, kernel_size // 2, bias=False, device=device, dtype=dtype
            )
            return [conv, nn.BatchNorm2d(channels, device=device, dtype=dtype)]

        self.branch1 = nn.Sequential(*depthwise(c), *pointwise(c)) if stride > 1 else nn.Sequential()
        self.branch2 = nn.Sequential(*pointwise(c if stride > 1 else half), *depthwise(half), *pointwise(half))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            return concat_shuffle((self.branch1(x), self.branch2(x)), 2)
        first, second = x.chunk(2, 1)
        return concat_shuffle((first, self.branch2(second)), 2)


class ShuffleNetV1Unit(nn.Module):
    """ShuffleNet's first unit: grouped pointwise convolutions round a depthwise one, and a shuffle of their groups.

    ``relu(x + main(x))`` with stride 1; ``cat(avg_pool(x), relu(main(x)))`` with stride 2. Zhang et al., "ShuffleNet:
    An Extremely Efficient Convolutional Neural Network for Mobile Devices", arXiv 1707.01083.

    The keys of the state dict (``branch_main_1``, ``branch_main_2``) are those of Megvii's implementation.

    Args:
        in_channels, out_channels: the same for stride 1; for stride 2 the pooled input is part of the output.
        groups: of the pointwise convolutions, divisors of their channels.
        first_groups: of the first one, where it has others: 1 in the first unit of the network.
        stride: 1 or 2.
        shuffle: "paper": before the depthwise convolution; "megvii": after it, and the other way round.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: channels, groups or a stride that do not fit, or an unknown shuffle.

    Example:
        >>> y = convblocks.ShuffleNetV1Unit(240, 240, groups=3)(torch.randn(2, 240, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 3,
        stride: int = 1,
        *,
        first_groups: int | None = None,
        shuffle: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "ShuffleNetV1Unit"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        g = positive(name, "groups", groups)
        first = g if first_groups is None else positive(name, "first_groups", first_groups)
        if stride not in (1, 2):
            raise ValueError(f"{name}: expected a stride of 1 or 2, got {stride}")
        if shuffle not in ("paper", "megvii"):
            raise ValueError(f"{name}: expected shuffle to be one of paper, megvii, got {shuffle}")
        if (stride == 1 and c != out) or (stride == 2 and c >= out):
            fits = f"{c}, as in_channels," if stride == 1 else f"more than {c}, the in_channels,"
            raise ValueError(f"{name}: expected out_channels of {fits} got {out}")
        mid, made = out // 4, out - c if stride == 2 else out
        for what, channels, divisor in (("in_channels", c, first), ("a quarter of out_channels", mid, first)):
            if channels == 0 or channels % divisor:
                raise ValueError(f"{name}: expected first_groups that divide {what}, {channels}, got {divisor}")
        for what, channels in (("a quarter of out_channels", mid), ("the channels it makes", made)):
            if channels % g:
                raise ValueError(f"{name}: expected groups that divide {what}, {channels}, got {g}")
        self.stride, self.paper = stride, shuffle == "paper"
        self.channel_shuffle = ChannelShuffle(g, inverse=not self.paper)

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, device=device, dtype=dtype)

        def pointwise(channels: int, to: int, groups: int) -> nn.Module:
            return nn.Conv2d(channels, to, 1, groups=groups, bias=False, device=device, dtype=dtype)

        depthwise = DepthwiseConv2d(mid, mid, 3, stride, 1, bias=False, device=device, dtype=dtype)
        self.branch_main_1 = nn.Sequential(
            pointwise(c, mid, first), norm(mid), nn.ReLU(inplace=True), depthwise, norm(mid)
        )
        self.branch_main_2 = nn.Sequential(pointwise(mid, made, g), norm(made))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self.branch_main_1):
            y = layer(y)
            if i == (2 if self.paper else 4):
                y = self.channel_shuffle(y)
        y = self.branch_main_2(y)
        if self.stride == 1:
            return F.relu(x + y)
        return torch.cat((F.avg_pool2d(x, 3, 2, 1), F.relu(y)), 1)
