from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.inception import InceptionBranches, inception_conv
from convblocks.blocks.inception_resnet import (
    InceptionResidual,
    InceptionResNetA,
    InceptionResNetB,
    InceptionResNetC,
    InceptionResNetReductionB,
)
from convblocks.blocks.inception_v4 import InceptionReductionA
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


class _Blocks:
    """Makes the blocks in turn; the probability with which one is skipped grows from 0 to a rate."""

    def __init__(self, total: int, drop_path_rate: float, attention: Attention, norm_eps: float) -> None:
        self.rates = [drop_path_rate * i / (total - 1) for i in range(total)]
        self.common: dict[str, Any] = {"attention": attention, "norm_eps": norm_eps}

    def one(self, cls: type[InceptionResidual], *arguments: Any, activation: bool = True) -> InceptionResidual:
        return cls(*arguments, activation=activation, drop_path=self.rates.pop(0), **self.common)

    def repeat(self, count: int, cls: type[InceptionResidual], *arguments: Any) -> nn.Sequential:
        return nn.Sequential(*[self.one(cls, *arguments) for _ in range(count)])


class InceptionResNet(Network):
    """Base of the two Inception-ResNets: a stem up to 192 channels."""

    least_size = 75

    def __init__(self, num_classes: int, in_channels: int, drop_rate: float, eps: float) -> None:
        super().__init__(num_classes, in_channels)
        self.conv2d_1a = inception_conv(in_channels, 32, 3, 2, eps=eps)
        self.conv2d_2a = inception_conv(32, 32, 3, padding=0, eps=eps)
        self.conv2d_2b = inception_conv(32, 64, 3, eps=eps)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = inception_conv(64, 80, 1, eps=eps)
        self.conv2d_4a = inception_conv(80, 192, 3, padding=0, eps=eps)
        self.drop = nn.Dropout(drop_rate)

    def stem(self) -> list[list[Any]]:
        s = self
        return [[s.conv2d_1a, s.conv2d_2a, s.conv2d_2b], [s.maxpool_3a, s.conv2d_3b, s.conv2d_4a]]

    def initialise(self) -> None:
        """As the authors' TF-slim: Glorot and Bengio, "Understanding the difficulty of training ..." (2010)."""
        for layer in outside_attention(self):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


class InceptionResNetV1(InceptionResNet):
    """Inception-ResNet v1, with an embedding before the classifier as for faces.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261; Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering",
    arXiv 1503.03832. The keys of the state dict are those of facenet-pytorch.

    Args:
        num_classes: 0: the embedding, of norm 1.
        in_channels: of the images.
        attention: in each block before its scale: a name ("se", "eca", "cbam", "simam", ...), what makes a module for
            C channels, or None.
        embedding: its channels.
        drop_rate: of the dropout before the embedding.
        drop_path_rate: the probability with which a sample skips the last block in training; it grows from 0 on.
        norm_eps: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.inception_resnet_v1(num_classes=0).eval()
        >>> faces = model(torch.randn(2, 3, 160, 160))
    """

    head_layers = ("last_linear", "last_bn", "logits")
    native = "official"

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        embedding: int = 512,
        drop_rate: float = 0.6,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-3,
    ) -> None:
        super().__init__(num_classes, in_channels, drop_rate, norm_eps)
        make = _Blocks(21, drop_path_rate, attention, norm_eps)
        positive(self.name, "embedding", embedding)
        self.conv2d_4b = inception_conv(192, 256, 3, 2, eps=norm_eps)
        self.repeat_1 = make.repeat(5, InceptionResNetA, 256, [[32], [32, 32], [32, 32, 32]], 0.17)
        self.mixed_6a = InceptionReductionA(256, (192, 192, 256, 384), norm_eps=norm_eps)
        self.repeat_2 = make.repeat(10, InceptionResNetB, 896, [[128], [128, 128, 128]], 0.10)
        self.mixed_7a = InceptionResNetReductionB(896, (256, 256, 256), norm_eps=norm_eps)
        widths = [[192], [192, 192, 192]]
        self.repeat_3 = make.repeat(5, InceptionResNetC, 1792, widths, 0.20)
        self.block8 = make.one(InceptionResNetC, 1792, widths, 1.0, activation=False)
        self.last_linear = nn.Linear(1792, embedding, bias=False)
        self.last_bn = nn.BatchNorm1d(embedding, eps=norm_eps)
        self.logits = classifier(embedding, num_classes)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        s = self
        return [
            *s.stem(),
            [s.conv2d_4b, s.repeat_1],
            [s.mixed_6a, s.repeat_2],
            [s.mixed_7a, s.repeat_3, s.block8],
        ]

    def forward_head(self, x: Tensor) -> Tensor:
        y = self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        y = self.logits(self.last_bn(self.last_linear(y)))
        return y if self.num_classes else F.normalize(y)


class InceptionResNetV2(InceptionResNet):
    """Inception-ResNet v2 as the authors' TF-slim and its weights have it, whose stem is not that of the paper.

    Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    arXiv 1602.07261. The keys of the state dict are those of timm.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: in each block before its scale: a name ("se", "eca", "cbam", "simam", ...), what makes a module for
            C channels, or None.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training; it grows from 0 on.
        norm_eps: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.inception_resnet_v2(num_classes=10, attention="se", drop_path_rate=0.1)
        >>> y = model(torch.randn(2, 3, 96, 96))
    """

    head_layers = ("classif",)
    native = "timm"
    layouts = (Layout("timm", (rename(r"last_linear\.(.+)", r"classif.\1"),)),)  # Cadene's, from which timm's came

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-3,
    ) -> None:
        super().__init__(num_classes, in_channels, drop_rate, norm_eps)
        make = _Blocks(40, drop_path_rate, attention, norm_eps)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = InceptionBranches(
            192,
            {"branch0": (96, 1)},
            {"branch1": [(48, 1), (64, 5)]},
            {"branch2": [(64, 1), (96, 3), (96, 3)]},
            {"branch3": [nn.AvgPool2d(3, 1, 1, count_include_pad=False), (64, 1)]},
            norm_eps=norm_eps,
        )
        self.repeat = make.repeat(10, InceptionResNetA, 320, [[32], [32, 32], [32, 48, 64]], 0.17)
        self.mixed_6a = InceptionReductionA(320, (256, 256, 384, 384), norm_eps=norm_eps)
        self.repeat_1 = make.repeat(20, InceptionResNetB, 1088, [[192], [128, 160, 192]], 0.10)
        self.mixed_7a = InceptionResNetReductionB(1088, (288, 288, 320), norm_eps=norm_eps)
        widths = [[192], [192, 224, 256]]
        self.repeat_2 = make.repeat(9, InceptionResNetC, 2080, widths, 0.20)
        self.block8 = make.one(InceptionResNetC, 2080, widths, 1.0, activation=False)
        self.conv2d_7b = inception_conv(2080, 1536, 1, eps=norm_eps)
        self.classif = classifier(1536, num_classes)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        s = self
        return [
            *s.stem(),
            [s.maxpool_5a, s.mixed_5b, s.repeat],
            [s.mixed_6a, s.repeat_1],
            [s.mixed_7a, s.repeat_2, s.block8, s.conv2d_7b],
        ]


register(InceptionResNetV1, {"inception_resnet_v1": {}}, image_size=160)
register(InceptionResNetV2, {"inception_resnet_v2": {}}, image_size=299)
