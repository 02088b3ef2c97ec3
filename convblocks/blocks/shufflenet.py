from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.branch import Branch
from convblocks.blocks.channel_shuffle import ChannelShuffle
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import Layers
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
        attention: at the end of the branch of three convolutions: a name ("se", "eca", "cbam", ...), what makes a
            module for C channels, or None.
        device, dtype: of the parameters, but for those of the attention.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: channels or a stride that do not fit, an unknown attention.

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
        attention: Attention = None,
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

        def norm(channels: int, activation: str) -> nn.Module:
            return BatchNormAct2d(channels, activation, inplace=True, device=device, dtype=dtype)

        def pointwise(channels: int) -> list[nn.Module]:  # the last stands for the activation in the keys
            conv = nn.Conv2d(channels, half, 1, bias=False, device=device, dtype=dtype)
            return [conv, norm(half, "relu"), nn.Identity()]

        def depthwise(channels: int) -> list[nn.Module]:
            conv = DepthwiseConv2d(
                channels, channels, kernel_size, stride, kernel_size // 2, bias=False, device=device, dtype=dtype
            )
            return [conv, norm(channels, "none")]

        self.branch1 = Layers(*depthwise(c), *pointwise(c)) if stride > 1 else Layers()
        self.branch2 = Layers(*pointwise(c if stride > 1 else half), *depthwise(half), *pointwise(half))
        self.se = attention_layer(name, attention, half)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.branch1(x), x) if self.stride > 1 else x.chunk(2, 1)
        second = self.branch2(second)
        return concat_shuffle((first, second if self.se is None else self.se(second)), 2)


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
        attention: after the last norm of the branch, before the activation: a name ("se", "eca", "cbam", ...), what
            makes a module for C channels, or None.
        drop_path: the probability with which a sample skips the branch in training; only with stride 1.
        device, dtype: of the parameters, but for those of the attention.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: channels, groups or a stride that do not fit; an unknown shuffle or attention.

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
        attention: Attention = None,
        drop_path: float = 0.0,
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
        if check_drop_path(name, drop_path) > 0 and stride == 2:
            raise ValueError(f"{name}: expected drop_path of 0 with a stride of 2, got {drop_path}")
        self.stride, self.drop_path = stride, drop_path
        self.se = attention_layer(name, attention, made)

        def norm(channels: int, activation: str) -> nn.Module:
            return BatchNormAct2d(channels, activation, inplace=True, device=device, dtype=dtype)

        def pointwise(channels: int, to: int, groups: int) -> nn.Module:
            return nn.Conv2d(channels, to, 1, groups=groups, bias=False, device=device, dtype=dtype)

        depthwise = DepthwiseConv2d(mid, mid, 3, stride, 1, bias=False, device=device, dtype=dtype)
        shuffled = nn.Identity() if g == 1 else ChannelShuffle(g, inverse=shuffle == "megvii")
        inside = shuffle == "paper"
        between = shuffled if inside else nn.Identity()
        self.channel_shuffle = nn.Identity() if inside else shuffled
        self.branch_main_1 = Layers(pointwise(c, mid, first), norm(mid, "relu"), between, depthwise, norm(mid, "none"))
        alone = self.se is None and drop_path == 0  # the norm ends the branch, with its activation
        self.branch_main_2 = Branch(pointwise(mid, made, g), norm(made, "relu" if alone else "none"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.channel_shuffle(self.branch_main_1(x))
        if self.se is None and self.drop_path == 0:
            y = self.branch_main_2(y, x if self.stride == 1 else None)
        else:
            y = self.branch_main_2(y)
            y = drop_path(y if self.se is None else self.se(y), self.drop_path, self.training)
            y = F.relu(x + y if self.stride == 1 else y, inplace=self.stride == 1)
        return y if self.stride == 1 else torch.cat((F.avg_pool2d(x, 3, 2, 1), y), 1)
