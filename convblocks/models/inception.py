from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.attention import Attention
from convblocks.blocks.inception import (
    InceptionBranches,
    InceptionV1Module,
    InceptionV3A,
    InceptionV3B,
    InceptionV3C,
    InceptionV3D,
    InceptionV3E,
    inception_conv,
)
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


class GoogLeNetOutputs(NamedTuple):
    """What Inception v1 returns in training with its auxiliary classifiers, as torchvision's does."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class InceptionOutputs(NamedTuple):
    """What Inception v3 returns in training with its auxiliary classifier, as torchvision's does."""

    logits: Tensor
    aux_logits: Tensor


class FromImageNet(nn.Module):
    """From images normalised by ImageNet's mean and deviation to such by 0.5 and 0.5, as the authors' weights take."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        planes = [x[:, i : i + 1] * (deviation[i] / 0.5) + (mean[i] - 0.5) / 0.5 for i in range(3)]
        return torch.cat(planes, 1)


class AuxiliaryV1(nn.Module):
    """Inception v1's classifier of a map within the network."""

    def __init__(self, in_channels: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.conv = inception_conv(in_channels, 128, 1, eps=eps)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.flatten(self.conv(F.adaptive_avg_pool2d(x, (4, 4))), 1)
        classes: Tensor = self.fc2(self.dropout(F.relu(self.fc1(y), inplace=True)))
        return classes


class AuxiliaryV3(nn.Module):
    """Inception v3's classifier of a map within the network, of at least 17 x 17 pixels."""

    def __init__(self, in_channels: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.conv0 = inception_conv(in_channels, 128, 1, eps=eps)
        self.conv1 = inception_conv(128, 768, 5, padding=0, eps=eps)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, torch.fx.Proxy) and min(x.shape[2:]) < 17:
            wanted, got = "a map of 17 x 17 pixels, so an image of 299 x 299", f"{x.shape[2]} x {x.shape[3]}"
            raise ValueError(f"InceptionV3: aux_logits in training: expected at least {wanted}, got a map of {got}")
        y = self.conv1(self.conv0(F.avg_pool2d(x, 5, 3)))
        classes: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))
        return classes


class Inception(Network):
    """Base of the Inception networks: an input transform, a mean, a dropout, and classifiers that are trained along.

    Attributes:
        auxiliary: the class of these.
        sees: by the attribute of each of them, that of the layer whose map it sees.
        outputs: what is returned in training with them: the classes, and theirs from the last on.
    """

    auxiliary: ClassVar[Any] = None
    sees: ClassVar[Mapping[str, str]] = {}
    outputs: ClassVar[Any] = None

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        drop_rate: float,
        transform_input: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if transform_input and in_channels != 3:
            raise ValueError(f"{self.name}: expected in_channels to be 3 with transform_input, got {in_channels}")
        self.transform = FromImageNet() if transform_input else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.aux_logits = False

    def add_auxiliaries(self, wanted: bool, eps: float) -> None:
        """At the end of the constructor; there are none without classes."""
        self.aux_logits = wanted and self.num_classes > 0
        for attribute, layer in self.sees.items():
            made = None
            if self.aux_logits:
                made = self.auxiliary(getattr(self, layer).out_channels, self.num_classes, eps)
            setattr(self, attribute, made)

    def initialise_normal(self, deviation: float) -> None:
        """All but attention, whose gates so large a deviation could close."""
        modules = [m.se for m in self.modules() if isinstance(m, InceptionBranches)]
        attention = {layer for se in modules if se is not None for layer in se.modules()}
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in attention:
                nn.init.trunc_normal_(layer.weight, std=deviation)

    def forward(self, x: Tensor) -> Any:
        if self.features_only or not (self.training and self.aux_logits):
            return super().forward(x)
        self.check(x)
        seen = {getattr(self, layer): getattr(self, attribute) for attribute, layer in self.sees.items()}
        found: list[Tensor] = []
        for stage in self.trunk():
            for layer in stage:
                x = layer(x)
                if layer in seen:
                    found.insert(0, seen[layer](x))
        return self.outputs(self.forward_head(x), *found)


class InceptionV1(Inception):
    """Inception v1, GoogLeNet, with norms.

    Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842, with the norms of Ioffe et al.,
    arXiv 1502.03167. The keys of the state dict are those of torchvision.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: after each module's concatenation: a name ("se", "eca", "cbam", "simam", ...), what makes a module
            for C channels, or None.
        large_kernel: of the branch that is 5x5 in the paper and 3x3 in torchvision and its weights.
        aux_logits: adds the two auxiliary classifiers; in training the result is then a ``GoogLeNetOutputs``.
        transform_input: takes images normalised by ImageNet's mean and deviation, for the authors' weights.
        drop_rate: of the dropout before the classifier.
        norm_eps: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention, a transform of other than three channels.

    Example:
        >>> model = convblocks.models.inception_v1(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    least_size = 15
    head_layers = ("fc", "aux1", "aux2")
    native = "torchvision"
    auxiliary = AuxiliaryV1
    sees: ClassVar[Mapping[str, str]] = {"aux1": "inception4a", "aux2": "inception4d"}
    outputs = GoogLeNetOutputs

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        large_kernel: int = 3,
        aux_logits: bool = False,
        transform_input: bool = False,
        drop_rate: float = 0.2,
        norm_eps: float = 1e-3,
    ) -> None:
        super().__init__(num_classes, in_channels, drop_rate, transform_input)
        options: dict[str, Any] = {"attention": attention, "norm_eps": norm_eps}
        self.conv1 = inception_conv(in_channels, 64, 7, 2, 3, eps=norm_eps)
        self.conv2 = inception_conv(64, 64, 1, eps=norm_eps)
        self.conv3 = inception_conv(64, 192, 3, eps=norm_eps)
        self.maxpool1, self.maxpool2, self.maxpool3 = (nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3))
        self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        channels = 192
        for name, widths in _V1_MODULES.items():
            module = InceptionV1Module(channels, *widths, large_kernel=large_kernel, **options)
            self.add_module(f"inception{name}", module)
            channels = module.out_channels
        self.fc = classifier(channels, num_classes)
        self.add_auxiliaries(aux_logits, norm_eps)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        s = self
        return [
            [s.transform, s.conv1],
            [s.maxpool1, s.conv2, s.conv3],
            [s.maxpool2, s.inception3a, s.inception3b],
            [s.maxpool3, s.inception4a, s.inception4b, s.inception4c, s.inception4d, s.inception4e],
            [s.maxpool4, s.inception5a, s.inception5b],
        ]

    def initialise(self) -> None:
        """As torchvision: a deviation of 0.01."""
        self.initialise_normal(0.01)


# By name, the channels of the branches.
_V1_MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class InceptionV3(Inception):
    """Inception v3: large convolutions made of small ones, in modules that differ from one resolution to the next.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. The keys of the state
    dict are those of torchvision and timm.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: after each module's concatenation: a name ("se", "eca", "cbam", "simam", ...), what makes a module
            for C channels, or None.
        aux_logits: adds the auxiliary classifier; in training the result is then an ``InceptionOutputs``, and images
            need at least 299 x 299 pixels.
        transform_input: takes images normalised by ImageNet's mean and deviation, for the authors' weights.
        drop_rate: of the dropout before the classifier.
        norm_eps: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention, a transform of other than three channels.

    Example:
        >>> model = convblocks.models.inception_v3(num_classes=10, attention="se")
        >>> y = model(torch.randn(2, 3, 96, 96))
    """

    least_size = 75
    head_layers = ("fc", "AuxLogits")
    native = "torchvision"
    auxiliary = AuxiliaryV3
    sees: ClassVar[Mapping[str, str]] = {"AuxLogits": "Mixed_6e"}
    outputs = InceptionOutputs

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        aux_logits: bool = False,
        transform_input: bool = False,
        drop_rate: float = 0.5,
        norm_eps: float = 1e-3,
    ) -> None:
        super().__init__(num_classes, in_channels, drop_rate, transform_input)
        options: dict[str, Any] = {"attention": attention, "norm_eps": norm_eps}
        self.Conv2d_1a_3x3 = inception_conv(in_channels, 32, 3, 2, eps=norm_eps)
        self.Conv2d_2a_3x3 = inception_conv(32, 32, 3, padding=0, eps=norm_eps)
        self.Conv2d_2b_3x3 = inception_conv(32, 64, 3, eps=norm_eps)
        self.Conv2d_3b_1x1 = inception_conv(64, 80, 1, eps=norm_eps)
        self.Conv2d_4a_3x3 = inception_conv(80, 192, 3, padding=0, eps=norm_eps)
        self.maxpool1, self.maxpool2 = nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2)
        channels = 192
        for name, (module, *own) in _V3_MODULES.items():
            made = module(channels, *own, **options)
            self.add_module(f"Mixed_{name}", made)
            channels = made.out_channels
        self.fc = classifier(channels, num_classes)
        self.add_auxiliaries(aux_logits, norm_eps)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        s = self
        return [
            [s.transform, s.Conv2d_1a_3x3, s.Conv2d_2a_3x3, s.Conv2d_2b_3x3],
            [s.maxpool1, s.Conv2d_3b_1x1, s.Conv2d_4a_3x3],
            [s.maxpool2, s.Mixed_5b, s.Mixed_5c, s.Mixed_5d],
            [s.Mixed_6a, s.Mixed_6b, s.Mixed_6c, s.Mixed_6d, s.Mixed_6e],
            [s.Mixed_7a, s.Mixed_7b, s.Mixed_7c],
        ]

    def initialise(self) -> None:
        """As torchvision: a deviation of 0.1, and smaller ones where the auxiliary classifier ends."""
        self.initialise_normal(0.1)
        auxiliary = getattr(self, "AuxLogits", None)
        if auxiliary is not None:
            nn.init.trunc_normal_(auxiliary.conv1.conv.weight, std=0.01)
            nn.init.trunc_normal_(auxiliary.fc.weight, std=0.001)


# By name, the class and what its constructor takes after the channels.
_V3_MODULES: dict[str, tuple[Any, ...]] = {
    "5b": (InceptionV3A, 32),
    "5c": (InceptionV3A, 64),
    "5d": (InceptionV3A, 64),
    "6a": (InceptionV3B,),
    "6b": (InceptionV3C, 128),
    "6c": (InceptionV3C, 160),
    "6d": (InceptionV3C, 160),
    "6e": (InceptionV3C, 192),
    "7a": (InceptionV3D,),
    "7b": (InceptionV3E,),
    "7c": (InceptionV3E,),
}


register(InceptionV1, {"inception_v1": {}})
register(InceptionV3, {"inception_v3": {}}, image_size=299)
