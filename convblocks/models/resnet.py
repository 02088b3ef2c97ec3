from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from convblocks.blocks.attention import Attention
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.fused import Layers
from convblocks.blocks.global_context import GlobalContext
from convblocks.blocks.resnet import BasicBlock, Bottleneck, ResidualBlock
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


def _deep_stem(in_channels: int, widths: tuple[int, int]) -> nn.Module:
    first, second = widths
    return Layers(
        nn.Conv2d(in_channels, first, 3, 2, 1, bias=False),
        BatchNormAct2d(first, "relu", inplace=True),
        nn.Identity(),
        nn.Conv2d(first, second, 3, 1, 1, bias=False),
        BatchNormAct2d(second, "relu", inplace=True),
        nn.Identity(),
        nn.Conv2d(second, 64, 3, 1, 1, bias=False),
    )


# The names of Cadene's networks, which timm's legacy ones have, too.
_CADENE = (rename(r"layer0\.((?:conv|bn)1\..+)", r"\1"), rename(r"last_linear\.(.+)", r"fc.\1"))


class ResNet(Network):
    """ResNet and what is built like it: wide ones, ResNeXt, Res2Net, and those with attention.

    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385; Zagoruyko and Komodakis, "Wide Residual
    Networks", arXiv 1605.07146; Xie et al. (ResNeXt), arXiv 1611.05431. The keys of the state dict are those of
    torchvision and timm.

    Args:
        block: the class of its blocks.
        layers: how many blocks each stage has.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: in each block: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or
            None.
        attention_stages: which stages have it, of 1 to 4.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training; it grows from 0 on.
        deep_stem: three 3x3 convolutions, with so many channels in the first two, instead of one of 7x7 ("-d").
        avg_down: the shortcuts average before a convolution of stride 1 ("-d").
        ceil_pool: the pooling before the first stage is not padded, and rounds the size up. Cadene's SE-ResNet-50 to
            152, timm's legacy ones, are ``se_resnet50(ceil_pool=True, stride_first=True, attention=...)`` with
            ``partial(convblocks.SqueezeExcite, rd_divisor=1)``.
        dilated: for each of the stages 2 to 4, whether it is dilated instead of strided.
        zero_init_last: starts the last norm of each block at 0.
        **options: of the blocks.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.resnet18(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("fc",)
    chains = (("conv1", "bn1"),)
    native = "torchvision"
    layouts = (
        Layout(
            "official",
            (
                rename(r"(.*)\.cbam\.(.+)", r"\1.se.\2"),
                rename(r"(.*)\.context_block\.(.+)", r"\1.se.\2"),
                rename(r"(.*\.conv2)\.0\.weight", r"\1.weight"),  # beside SimAM, which has no keys
                *_CADENE,
            ),
        ),
        Layout("timm", _CADENE),
    )

    def __init__(
        self,
        block: type[Any],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        attention_stages: Sequence[int] = (1, 2, 3, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deep_stem: tuple[int, int] | None = None,
        avg_down: bool = False,
        ceil_pool: bool = False,
        dilated: tuple[bool, bool, bool] = (False, False, False),
        zero_init_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if len(dilated) != 3:
            raise ValueError(f"ResNet: expected dilated to be of 3 stages, got {dilated}")
        if not set(attention_stages) <= {1, 2, 3, 4}:
            raise ValueError(f"ResNet: expected attention_stages of 1 to 4, got {tuple(attention_stages)}")
        if deep_stem is None:
            self.conv1: nn.Module = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        else:
            self.conv1 = _deep_stem(in_channels, deep_stem)
        self.bn1 = BatchNormAct2d(64, "relu", inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True) if ceil_pool else nn.MaxPool2d(3, 2, 1)
        self.least_size = 3 if ceil_pool else 1
        channels, dilation, made, total = 64, 1, 0, sum(layers)
        for stage, count in enumerate(layers, 1):
            planes, stride, first_dilation = 32 << stage, 1 if stage == 1 else 2, dilation
            if stage > 1 and dilated[stage - 2]:
                stride, dilation = 1, dilation * 2
            blocks = []
            for i in range(count):
                out, own = planes * block.expansion, stride if i == 0 else 1
                shortcut = self._shortcut(channels, out, own, avg_down) if own > 1 or channels != out else None
                if attention is not None and stage in attention_stages:
                    options["attention"] = attention
                else:
                    options.pop("attention", None)
                blocks.append(
                    block(
                        channels,
                        planes,
                        own,
                        shortcut,
                        dilation=dilation,
                        first_dilation=first_dilation if i == 0 else dilation,
                        drop_path=drop_path_rate * made / max(1, total - 1),
                        **options,
                    )
                )
                channels, made = out, made + 1
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.drop = nn.Dropout(drop_rate)
        self.fc = classifier(channels, num_classes)
        self.initialise()
        if zero_init_last:
            for residual in self.modules():
                if isinstance(residual, ResidualBlock):
                    nn.init.zeros_([m for m in residual.children() if isinstance(m, nn.BatchNorm2d)][-1].weight)

    @staticmethod
    def _shortcut(channels: int, out: int, stride: int, avg_down: bool) -> nn.Module:
        if not avg_down:
            return ConvNormAct(channels, out, 1, stride, activation="none", names=("0", "1"))
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        conv = ConvNormAct(channels, out, 1, activation="none")
        return Layers(pool, *conv)

    def trunk(self) -> list[list[Any]]:
        s = self
        return [[s.conv1, s.bn1], [s.maxpool, s.layer1], [s.layer2], [s.layer3], [s.layer4]]


_BASIC: dict[str, dict[str, Any]] = {
    "18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
}
_BOTTLENECK: dict[str, dict[str, Any]] = {
    "50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
}
_DEPTHS = _BASIC | _BOTTLENECK
_CONTEXT = partial(GlobalContext.official, ratio=1 / 16)  # that of the paper

register(ResNet, {f"resnet{depth}": options for depth, options in _DEPTHS.items()})
register(ResNet, {f"wide_resnet{depth}_2": _BOTTLENECK[depth] | {"base_width": 128} for depth in ("50", "101")})
register(
    ResNet,
    {
        f"resnext{depth}_{groups}x{width}d": _BOTTLENECK[depth] | {"groups": groups, "base_width": width}
        for depth, groups, width in (("50", 32, 4), ("101", 32, 4), ("101", 32, 8), ("101", 64, 4))
    },
)
for _attention in ("se", "cbam", "eca"):
    register(ResNet, {f"{_attention}_resnet{d}": o | {"attention": _attention} for d, o in _DEPTHS.items()})
register(
    ResNet,
    {
        f"gc_resnet{depth}": options | {"attention": _CONTEXT, "attention_stages": (2, 3, 4)}
        for depth, options in _DEPTHS.items()
    },
)
register(
    ResNet,
    {f"simam_resnet{d}": o | {"attention": "simam", "attention_at": "middle"} for d, o in _DEPTHS.items()},
)
