from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention
from convblocks.blocks.convert import Layout, StateDict, rename
from convblocks.blocks.vgg import VGGBlock
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


def _flatten(sd: StateDict) -> StateDict:
    """The linear layers that timm writes as convolutions."""
    hidden = ("pre_logits.fc1.weight", "pre_logits.fc2.weight")
    return {k: v.flatten(1) if k in hidden and v.dim() == 4 else v for k, v in sd.items()}


_UNIT = re.compile(r"features\.stage(\d+)\.unit(\d+)\.(conv|bn)\.(.+)")


def _numbered(sd: StateDict) -> StateDict:
    """The layers that pytorchcv names by stage and unit, under the numbers that torchvision counts."""
    keys = {key: found for key in sd if (found := _UNIT.fullmatch(key)) is not None}
    units = sorted({(int(found[1]), int(found[2])) for found in keys.values()})
    apart = 3 if any(found[3] == "bn" for found in keys.values()) else 2
    first = {unit: i * apart + unit[0] - 1 for i, unit in enumerate(units)}  # with the pools of the stages before

    def name(key: str) -> str:
        if (found := keys.get(key)) is None:
            return key
        return f"features.{first[int(found[1]), int(found[2])] + (found[3] == 'bn')}.{found[4]}"

    return {name(key): value for key, value in sd.items()}


class VGG(Network):
    """VGG: 3x3 convolutions in five blocks, then three linear layers.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv 1409.1556:
    configurations A, B, D and E. The keys of the state dict are those of torchvision; those of an attention,
    ``features.se1`` to ``features.se5``, leave them as they are.

    Args:
        layers: how many convolutions each block has.
        num_classes: 0: the features before the last linear layer.
        in_channels: of the images.
        norm: puts a batch norm after each convolution ("_bn").
        bias: whether the convolutions have one: with norms they do in torchvision, and do not in most of pytorchcv's.
        attention: before each pool: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or
            None.
        hidden: channels of the two linear layers before the last.
        drop_rate: of the dropout after each of these.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.vgg11_bn(num_classes=10, hidden=64, attention="eca")
        >>> y = model(torch.randn(2, 3, 32, 32))
    """

    least_size = 32
    head_layers = ("classifier",)
    native = "torchvision"
    layouts = (
        Layout(
            "timm",
            (
                _flatten,
                rename(r"pre_logits\.fc1\.(.+)", r"classifier.0.\1"),
                rename(r"pre_logits\.fc2\.(.+)", r"classifier.3.\1"),
                rename(r"head\.fc\.(.+)", r"classifier.6.\1"),
            ),
        ),
        Layout(
            "pytorchcv",
            (
                _numbered,
                rename(r"output\.fc1\.fc\.(.+)", r"classifier.0.\1"),
                rename(r"output\.fc2\.fc\.(.+)", r"classifier.3.\1"),
                rename(r"output\.fc3\.(.+)", r"classifier.6.\1"),
            ),
        ),
    )

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        norm: bool = False,
        bias: bool = True,
        attention: Attention = None,
        hidden: int = 4096,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__(num_classes, in_channels)
        positive(self.name, "hidden", hidden)
        self.features = nn.Sequential()
        channels = in_channels
        for i, (count, width) in enumerate(zip(layers, (64, 128, 256, 512, 512), strict=True), 1):
            block = VGGBlock(channels, width, count, norm=norm, bias=bias, attention=attention)
            first = len([key for key in self.features._modules if key.isdecimal()])
            for key, layer in block.named_children():
                self.features.add_module(str(first + int(key)) if key.isdecimal() else f"{key}{i}", layer)
            channels = width
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            classifier(hidden, num_classes),
        )
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        found: list[list[Any]] = [[]]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append([])
            found[-1].append(layer)
        return found

    def forward_head(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (7, 7)), 1))
        return y

    def initialise(self) -> None:
        """As torchvision: convolutions as He et al. (arXiv 1502.01852), linear layers by a deviation of 0.01."""
        super().initialise()
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)


_LAYERS = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}

register(VGG, {f"vgg{depth}": {"layers": layers} for depth, layers in _LAYERS.items()})
register(VGG, {f"vgg{depth}_bn": {"layers": layers, "norm": True} for depth, layers in _LAYERS.items()})
