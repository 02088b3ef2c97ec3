from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.darknet import DarknetResidual
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


def _of_pytorchcv(found: re.Match[str]) -> str:
    """There, stages and their units are counted from 1, and the first unit is the strided convolution."""
    stage, unit, layer = int(found[1]) - 1, int(found[2]), found[3]
    return f"stages.{stage}.conv_down.{layer}" if unit == 1 else f"stages.{stage}.blocks.{unit - 2}.{layer}"


def _of_mmdet(found: re.Match[str]) -> str:
    stage, block, layer = int(found[1]) - 1, found[2], found[3]
    return f"stages.{stage}.conv_down.{layer}" if block is None else f"stages.{stage}.blocks.{block}.{layer}"


class Darknet(Network):
    """Darknet-53, the trunk of YOLOv3, and what is built like it.

    Redmon and Farhadi, "YOLOv3: An Incremental Improvement", arXiv 1804.02767. The keys of the state dict are those of
    timm; those of pytorchcv and of mmdet's trunk are read, too.

    Args:
        layers: how many blocks each stage has.
        width: channels of the first convolution; each stage doubles them.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        negative_slope: of the leaky ReLUs: 0.1 is that of the authors, pytorchcv and mmdet, 0.01 that of timm's
            weights, which have the same keys.
        attention: in each block, between the convolutions: a name ("se", "eca", "cbam", "simam", ...), what makes a
            module for channels, or None.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training; it grows from 0 on.
        norm_eps: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.darknet53(num_classes=10, layers=(1, 1, 1, 1, 1))
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("head",)
    native = "timm"
    layouts = (
        Layout(
            "pytorchcv",
            (
                rename(r"features\.init_block\.(.+)", r"stem.conv1.\1"),
                rename(r"features\.stage(\d)\.unit(\d)\.(.+)", _of_pytorchcv),
                rename(r"output\.(.+)", r"head.fc.\1"),
            ),
        ),
        Layout(
            "mmdet",
            (
                rename(r"(?:backbone\.)?(conv1\..+)", r"stem.\1"),
                rename(r"(?:backbone\.)?(?:conv_res|cr)_block(\d)\.(?:conv|res(\d))\.(.+)", _of_mmdet),
            ),
        ),
    )

    def __init__(
        self,
        layers: Sequence[int] = (1, 2, 8, 8, 4),
        width: int = 32,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        negative_slope: float = 0.1,
        attention: Attention = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(num_classes, in_channels)
        act: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": negative_slope, "eps": norm_eps}
        self.stem = nn.Sequential(OrderedDict(conv1=ConvNormAct(in_channels, width, **act)))
        stages: list[nn.Module] = []
        made, total = 0, sum(layers)
        for count in layers:
            down = ConvNormAct(width, width * 2, stride=2, **act)
            width *= 2
            blocks = []
            for _ in range(count):
                drop = drop_path_rate * made / max(1, total - 1)
                blocks.append(
                    DarknetResidual(width, negative_slope, attention=attention, drop_path=drop, norm_eps=norm_eps)
                )
                made += 1
            stages.append(nn.Sequential(OrderedDict(conv_down=down, blocks=nn.Sequential(*blocks))))
        self.stages = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Sequential(OrderedDict(fc=classifier(width, num_classes)))
        self.initialise()

    def initialise(self) -> None:
        """As the authors' C code: all layers by their fan in, that of the classes, too; no bias."""
        for layer in outside_attention(self):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def trunk(self) -> list[list[Any]]:
        first, *others = self.stages
        return [[self.stem, first], *([stage] for stage in others)]


register(Darknet, {"darknet53": {"layers": (1, 2, 8, 8, 4)}}, image_size=256)
