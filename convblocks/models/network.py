"""What all networks share: stages, a head, and the check of the images that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.convert import Layout


class Stages(nn.Sequential):
    """The stages of a network whose keys call them that: layers, and what ``Network.stages`` gives."""

    def forward(self, *x: Tensor) -> Any:
        for layer in self if x else ():
            x = (layer(*x),)
        return x[0] if x else [[stage] for stage in self]


class Network(nn.Module):
    """Base of the networks.

    A subclass gives ``stages`` and ``forward_head``, and calls ``initialise`` at the end of its constructor.

    Attributes:
        name: what the messages call it.
        in_channels: of the images.
        least_size: the height and width, in pixels, below which its layers have nothing to work on.
        stages: gives layers that are applied in turn; each list ends in a map of its own resolution or purpose. A
            method, or ``Stages``.
        head: names of its layers that make classes of the last map: what ``features_only`` does without. Or, where its
            keys begin with that word, the one layer.
        layouts: key layouts of others from which ``convert_state_dict`` reads a state dict of it.
    """

    least_size: int = 1
    stages: Callable[..., list[list[Any]]]
    head: tuple[str, ...] | nn.ModuleDict
    layouts: ClassVar[tuple[Layout, ...]] = ()

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.in_channels = positive(self.name, "in_channels", in_channels)
        if num_classes != 0:  # which asks for the pooled features
            positive(self.name, "num_classes", num_classes)
        self.num_classes = num_classes
        self.features_only = False
        if not hasattr(type(self), "head"):
            self.head = ()  # until a layer takes the name

    def sequence(self) -> list[list[Any]]:
        """The stages, the first with the stem."""
        return self.stages()

    def forward_head(self, x: Tensor) -> Tensor:
        """From the last map to the classes."""
        raise NotImplementedError

    def without_head(self) -> Network:
        """Makes it return the map at the end of each stage, a list; its head is deleted."""
        for layer in ("head",) if isinstance(self.head, nn.Module) else self.head:
            delattr(self, layer)
        self.features_only = True
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map."""
        self.check(x)
        for stage in self.sequence():
            for layer in stage:
                x = layer(x)
        return x

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The map at the end of each stage."""
        self.check(x)
        maps = []
        for stage in self.sequence():
            for layer in stage:
                x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            return self.forward_maps(x)
        return self.forward_head(self.forward_features(x))

    def check(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy) or isinstance(x.shape[0], Tensor):  # traced: sizes are not known
            return
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            wanted = f"images of size (N, {self.in_channels}, H, W)"
            raise ValueError(f"{self.name}: expected {wanted}, got a {x.dim()}-D tensor of size {list(x.shape)}")
        if x.shape[2] < self.least_size or x.shape[3] < self.least_size:
            least = f"{self.least_size} x {self.least_size}"
            raise ValueError(
                f"{self.name}: expected images of at least {least} pixels, got {x.shape[2]} x {x.shape[3]}"
            )

    def initialise(self) -> None:
        """As He et al. (arXiv 1502.01852): convolutions by the fan out; norms to the identity."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def classifier(channels: int, num_classes: int, bias: bool = True) -> nn.Module:
    return nn.Linear(channels, num_classes, bias) if num_classes else nn.Identity()
