from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, StateDict, rename
from convblocks.blocks.shufflenet import ShuffleNetV1Unit, ShuffleNetV2Unit
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register

_UNIT = re.compile(r"features\.stage(\d+)\.unit(\d+)\.(\w+)\.(.+)")
_PYTORCHCV = {
    "compress_conv1": "branch2.0",
    "compress_bn1": "branch2.1",
    "dw_conv2": "branch2.3",
    "dw_bn2": "branch2.4",
    "expand_conv3": "branch2.5",
    "expand_bn3": "branch2.6",
    "dw_conv4": "branch1.0",
    "dw_bn4": "branch1.1",
    "expand_conv5": "branch1.2",
    "expand_bn5": "branch1.3",
}


def _renumbered(sd: StateDict) -> StateDict:
    """pytorchcv's units, counted from the first one on, as torchvision's."""

    def name(m: re.Match[str]) -> str:
        return f"stage{int(m[1]) + 1}.{int(m[2]) - 1}.{_PYTORCHCV.get(m[3], m[3])}.{m[4]}"

    return {_UNIT.sub(name, key): value for key, value in sd.items()}


class ShuffleNet(Network):
    """Base of both versions: a stem, three groups of units, and how their weights start."""

    repeats = (4, 8, 4)

    def initialise(self) -> None:
        """As the authors' implementations of both; attention as it comes."""
        for name, layer in self.named_modules():
            if ".se." in name:
                continue
            if isinstance(layer, nn.Conv2d):
                stem = name.startswith(("conv1", "first_conv"))
                nn.init.normal_(layer.weight, 0.0, 0.01 if stem else 1 / layer.weight.shape[1])
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.constant_(layer.bias, 0.0001)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


class ShuffleNetV2(ShuffleNet):
    """ShuffleNet V2.

    Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", arXiv 1807.11164. The keys
    of the state dict are those of torchvision.

    Args:
        widths: channels of the three groups of units and of the last convolution.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: in each unit, at the end of its longer branch: a name ("se", "eca", "cbam", ...), what makes a module
            for C channels, or None.
        pool_padding: of the max pooling: 1, or 0 as pytorchcv's networks, whose pooling rounds up.
        drop_rate: of the dropout before the classifier.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.shufflenet_v2_x0_5(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("fc",)
    native = "torchvision"
    layouts = (
        Layout(
            "pytorchcv",
            (
                rename(r"features\.init_block\.conv\.conv\.(.+)", r"conv1.0.\1"),
                rename(r"features\.init_block\.conv\.bn\.(.+)", r"conv1.1.\1"),
                _renumbered,
                rename(r"features\.final_block\.conv\.(.+)", r"conv5.0.\1"),
                rename(r"features\.final_block\.bn\.(.+)", r"conv5.1.\1"),
                rename(r"output\.(weight|bias)", r"fc.\1"),
            ),
        ),
    )

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        pool_padding: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if len(widths) != 4:
            raise ValueError(f"ShuffleNetV2: expected 4 widths, got {len(widths)}")
        if pool_padding not in (0, 1):
            raise ValueError(f"ShuffleNetV2: expected a pool_padding of 0 or 1, got {pool_padding}")
        c, self.least_size = 24, 3 if pool_padding == 0 else 1
        self.conv1 = ConvNormAct(in_channels, c, 3, 2, names=("0", "1"))
        self.maxpool = nn.MaxPool2d(3, 2, pool_padding, ceil_mode=pool_padding == 0)
        for stage, (count, out) in enumerate(zip(self.repeats, widths[:3], strict=True), 2):
            units = []
            for i in range(count):
                units.append(ShuffleNetV2Unit(c, out, 2 if i == 0 else 1, attention=attention))
                c = out
            self.add_module(f"stage{stage}", nn.Sequential(*units))
        self.conv5 = ConvNormAct(c, widths[3], 1, names=("0", "1"))
        self.drop = nn.Dropout(drop_rate)
        self.fc = classifier(widths[3], num_classes)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        s = self
        return [[s.conv1], [s.maxpool], [s.stage2], [s.stage3], [s.stage4, s.conv5]]


_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # of the first group of units, by the groups of convolutions


class ShuffleNetV1(ShuffleNet):
    """ShuffleNet, the first version.

    Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", arXiv
    1707.01083. The keys of the state dict are those of Megvii's implementation, as is the shuffle, unless the paper's
    is asked for.

    Args:
        groups: of the pointwise convolutions: 1, 2, 3, 4 or 8.
        width: factor of the channels: 0.5, 1, 1.5 and 2 as published; others are rounded up to what the groups divide.
        shuffle: "megvii" or "paper": of ``ShuffleNetV1Unit``.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: in each unit, after the last norm of its branch: a name ("se", "eca", "cbam", ...), what makes a
            module for C channels, or None.
        drop_rate: of the dropout before the classifier, which has no bias.
        drop_path_rate: the probability with which a sample skips the last unit in training; it grows from 0 on, and is
            0 in units with stride.

    Raises:
        ValueError: numbers out of range, an unknown shuffle or attention.

    Example:
        >>> model = convblocks.models.shufflenet_v1(groups=8, width=0.5, num_classes=10)
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("classifier",)
    native = "official"

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        groups: int = 3,
        width: float = 1.0,
        shuffle: str = "megvii",
        attention: Attention = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if positive("ShuffleNetV1", "groups", groups) not in _CHANNELS:
            allowed = ", ".join(map(str, _CHANNELS))
            raise ValueError(f"ShuffleNetV1: expected groups to be one of {allowed}, got {groups}")
        if not width > 0:
            raise ValueError(f"ShuffleNetV1: expected a width above 0, got {width}")

        def scaled(channels: int, divisor: int) -> int:
            return -(-int(channels * width) // divisor) * divisor

        c = 48 if width >= 2 else 24 if width >= 1 else scaled(24, groups)
        self.first_conv = ConvNormAct(in_channels, c, 3, 2, names=("0", "1"))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        units: list[nn.Module] = []
        for stage, count in enumerate(self.repeats):
            out = scaled(_CHANNELS[groups], 4 * groups) << stage
            for i in range(count):
                unit = ShuffleNetV1Unit(
                    c,
                    out,
                    groups,
                    2 if i == 0 else 1,
                    first_groups=None if units else 1,
                    shuffle=shuffle,
                    attention=attention,
                    drop_path=drop_path_rate * len(units) / (sum(self.repeats) - 1) if i > 0 else 0.0,
                )
                units.append(unit)
                c = out
        self.features = nn.Sequential(*units)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = nn.Sequential(classifier(c, num_classes, bias=False))
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        ends = [sum(self.repeats[:i]) for i in range(4)]
        groups = [list(self.features[a:b]) for a, b in pairwise(ends)]
        return [[self.first_conv], [self.maxpool], *groups]


register(
    ShuffleNetV2,
    {
        "shufflenet_v2_x0_5": {"widths": (48, 96, 192, 1024)},
        "shufflenet_v2_x1_0": {"widths": (116, 232, 464, 1024)},
        "shufflenet_v2_x1_5": {"widths": (176, 352, 704, 1024)},
        "shufflenet_v2_x2_0": {"widths": (244, 488, 976, 2048)},
    },
)
register(ShuffleNetV1, {"shufflenet_v1": {}})
