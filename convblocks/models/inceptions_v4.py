from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.inception import InceptionBranches, inception_conv
from convblocks.blocks.inception_v4 import (
    InceptionReductionA,
    InceptionV4A,
    InceptionV4B,
    InceptionV4C,
    InceptionV4ReductionB,
)
from convblocks.models.inception import Inception
from convblocks.models.network import classifier
from convblocks.models.registry import register


class InceptionV4(Inception):
    """Inception v4: a stem that concatenates, too, and more modules than v3.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: after the concatenation of each module but the stem's: a name ("se", "eca", "cbam", "simam", ...),
            what makes a module for C channels, or None.
        drop_rate: of the dropout before the classifier.
        norm_eps: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.inception_v4(num_classes=10, attention="simam")
        >>> y = model(torch.randn(2, 3, 96, 96))
    """

    least_size = 75
    head_layers = ("last_linear",)
    native = "timm"

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        drop_rate: float = 0.2,
        norm_eps: float = 1e-3,
    ) -> None:
        super().__init__(num_classes, in_channels, drop_rate)
        factorised = [(64, 1), (64, (1, 7)), (64, (7, 1)), (96, 3, 1, 0)]
        own: dict[str, Any] = {"attention": attention, "norm_eps": norm_eps}
        self.features = nn.Sequential(
            inception_conv(in_channels, 32, 3, 2, eps=norm_eps),
            inception_conv(32, 32, 3, padding=0, eps=norm_eps),
            inception_conv(32, 64, 3, eps=norm_eps),
            InceptionBranches(64, {"maxpool": nn.MaxPool2d(3, 2)}, {"conv": (96, 3, 2)}, norm_eps=norm_eps),
            InceptionBranches(160, {"branch0": [(64, 1), (96, 3, 1, 0)]}, {"branch1": factorised}, norm_eps=norm_eps),
            InceptionBranches(192, {"conv": (192, 3, 2)}, {"maxpool": nn.MaxPool2d(3, 2)}, norm_eps=norm_eps),
            *[InceptionV4A(384, **own) for _ in range(4)],
            InceptionReductionA(384, (192, 224, 256, 384), **own),
            *[InceptionV4B(1024, **own) for _ in range(7)],
            InceptionV4ReductionB(1024, **own),
            *[InceptionV4C(1536, **own) for _ in range(3)],
        )
        self.last_linear = classifier(1536, num_classes)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        layers, ends = list(self.features), (0, 3, 4, 10, 18, 22)
        return [layers[start:end] for start, end in pairwise(ends)]

    def initialise(self) -> None:
        """As the authors' TF-slim: He et al. (arXiv 1502.01852) by the fan in."""
        for layer in outside_attention(self):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")


register(InceptionV4, {"inception_v4": {}}, image_size=299)
