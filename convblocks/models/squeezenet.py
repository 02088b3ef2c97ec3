from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.convert import Layout, StateDict, rename
from convblocks.blocks.fire import Fire
from convblocks.models.network import Network
from convblocks.models.registry import register

_UNIT = re.compile(r"features\.stage(\d+)\.unit(\d+)\.(\w+)\.conv\.(.+)")


def _numbered(sd: StateDict) -> StateDict:
    """pytorchcv's stages and units as torchvision's one sequence, where a pooling stands before each stage."""
    found = {key: match for key in sd if (match := _UNIT.fullmatch(key))}
    units = sorted({(int(m[1]), int(m[2])) for m in found.values()})
    places = {unit: 2 + unit[0] + i for i, unit in enumerate(units)}
    new = {k: f"features.{places[int(m[1]), int(m[2])]}.{m[3]}.{m[4]}" for k, m in found.items()}
    return {new.get(key, key): value for key, value in sd.items()}


class SqueezeNet(Network):
    """SqueezeNet: Fire blocks, with a max pooling before each group of them.

    Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", arXiv
    1602.07360. The keys of the state dict are those of torchvision.

    Args:
        stem: channels and kernel of the first convolution.
        squeeze: the squeeze channels of the blocks of each group.
        num_classes: 0: the pooled features, 512.
        in_channels: of the images.
        attention: after the concatenation of each block: a name ("se", "eca", "cbam", ...), what makes a module for C
            channels, or None.
        bypass: adds their input to the blocks that make no more channels than they get (the paper's simple bypass).
        drop_rate: of the dropout before the classifier, a 1x1 convolution.
        drop_path_rate: with ``bypass``, the probability with which a sample skips the last block in training; it grows
            from 0 on.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.squeezenet1_1(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("classifier",)
    native = "torchvision"
    layouts = (
        Layout(
            "pytorchcv",
            (
                rename(r"features\.init_block\.conv\.(.+)", r"features.0.\1"),
                _numbered,
                rename(r"output\.final_conv\.(.+)", r"classifier.1.\1"),
            ),
        ),
    )

    def __init__(
        self,
        stem: tuple[int, int],
        squeeze: Sequence[Sequence[int]],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        bypass: bool = False,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if drop_path_rate > 0 and not bypass:
            raise ValueError(f"SqueezeNet: expected drop_path_rate of 0 without bypass, got {drop_path_rate}")
        c, kernel = stem
        layers: list[nn.Module] = [nn.Conv2d(in_channels, c, kernel, 2), nn.ReLU(inplace=True)]
        made, total = 0, sum(map(len, squeeze))
        for group in squeeze:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for s in group:
                adds = bypass and c == 8 * s
                drop = drop_path_rate * made / max(1, total - 1) if adds else 0.0
                layers.append(Fire(c, s, bypass=adds, attention=attention, drop_path=drop))
                c, made = 8 * s, made + 1
        self.features = nn.Sequential(*layers)
        last = nn.Conv2d(c, num_classes, 1) if num_classes else nn.Identity()
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        # A pooling of 3 pixels, rounded up, needs 2 to make 1.
        self.least_size = kernel + 2 * (2 ** len(squeeze) - 1)
        self.initialise()

    def initialise(self) -> None:
        """As torchvision: by the fan in, the classifier with little."""
        for layer in outside_attention(self):
            if isinstance(layer, nn.Conv2d):
                if layer is self.classifier[1]:
                    nn.init.normal_(layer.weight, 0.0, 0.01)
                else:
                    nn.init.kaiming_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def trunk(self) -> list[list[Any]]:
        groups: list[list[Any]] = [[]]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                groups.append([])
            groups[-1].append(layer)
        return groups

    def forward_head(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(x).flatten(1)
        return y


register(
    SqueezeNet,
    {
        "squeezenet1_0": {"stem": (96, 7), "squeeze": ((16, 16, 32), (32, 48, 48, 64), (64,))},
        "squeezenet1_1": {"stem": (64, 3), "squeeze": ((16, 16), (32, 32), (48, 48, 64, 64))},
    },
)
