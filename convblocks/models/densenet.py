from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from convblocks.blocks.attention import Attention
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.densenet import DenseBlock, Transition
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


class DenseNet(Network):
    """DenseNet: blocks in which each layer sees what all before it made, and transitions between them.

    Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993. The keys of the state dict are those of
    torchvision and timm; those of torchvision's released weights (``norm.1``) are read, too.

    Args:
        layers: how many each block has.
        growth_rate: channels that each layer adds.
        width: channels of the stem; twice the growth rate when left out.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        bn_size: the layers' 1x1 convolutions make bn_size * growth_rate channels; 0: there are none.
        attention: of what each layer adds: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C
            channels, or None.
        drop_rate: of the dropout before the classifier; ``layer_drop_rate`` of that of what each layer adds.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.densenet121(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("classifier",)
    native = "torchvision"
    least_size = 29  # the last transition halves a map of 2 x 2
    layouts = (Layout("torchvision", (rename(r"(.+\.denselayer\d+\.(?:norm|conv))\.([12]\..+)", r"\1\2"),)),)

    def __init__(
        self,
        layers: Sequence[int],
        growth_rate: int = 32,
        width: int | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        bn_size: int = 4,
        attention: Attention = None,
        drop_rate: float = 0.0,
        layer_drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        channels = 2 * growth_rate if width is None else width
        features: OrderedDict[str, nn.Module] = OrderedDict()
        features["conv0"] = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
        features["norm0"] = BatchNormAct2d(channels, "relu", inplace=True)
        features["pool0"] = nn.MaxPool2d(3, 2, 1)
        for stage, count in enumerate(layers, 1):
            block = DenseBlock(channels, count, growth_rate, bn_size, attention=attention, drop_rate=layer_drop_rate)
            features[f"denseblock{stage}"] = block
            channels = block.out_channels
            if stage < len(layers):
                features[f"transition{stage}"] = Transition(channels)
                channels //= 2
        features["norm5"] = BatchNormAct2d(channels, "relu")  # hooks keep the map before it
        self.features = nn.Sequential(features)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(channels, num_classes)
        self.initialise()  # as the authors' Lua code: by the fan out, and no bias
        if isinstance(self.classifier, nn.Linear):
            nn.init.zeros_(self.classifier.bias)

    def trunk(self) -> list[list[Any]]:
        stages: list[list[Any]] = [[]]
        for name, layer in self.features.named_children():
            if name.startswith(("pool", "transition")):
                stages.append([])
            stages[-1].append(layer)
        return stages


register(
    DenseNet,
    {
        "densenet121": {"layers": (6, 12, 24, 16)},
        "densenet161": {"layers": (6, 12, 36, 24), "growth_rate": 48},
        "densenet169": {"layers": (6, 12, 32, 32)},
        "densenet201": {"layers": (6, 12, 48, 32)},
        "densenet264": {"layers": (6, 12, 64, 48)},
    },
)
