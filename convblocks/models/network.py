"""What all networks share: stages, a head, and the check of the images that they are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import outside_attention
from convblocks.blocks.convert import Layout
from convblocks.blocks.fused import arranged, restored, run_layers
from convblocks.blocks.layers import is_plain


class Network(nn.Module, ABC):
    """Base of the networks.

    A subclass gives ``trunk``, another ``forward_head`` where its own is not the usual one, and calls ``initialise`` at
    the end of its constructor.

    Attributes:
        name: what the messages call it.
        in_channels: of the images.
        least_size: the height and width, in pixels, below which its layers have nothing to work on.
        head_layers: its layers that make classes of the last map: what ``features_only`` does without.
        native: whose keys the state dict has.
        layouts: key layouts of others from which ``convert_state_dict`` reads a state dict of it.
    """

    least_size: int = 1
    drop: nn.Module
    head_layers: ClassVar[tuple[str, ...]] = ()
    native: ClassVar[str] = "convblocks"
    layouts: ClassVar[tuple[Layout, ...]] = ()

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.in_channels = positive(self.name, "in_channels", in_channels)
        if num_classes != 0:  # which asks for the pooled features
            positive(self.name, "num_classes", num_classes)
        self.num_classes = num_classes
        self.features_only = False

    def train(self, mode: bool = True) -> Network:
        if any(type(layer) is nn.SyncBatchNorm for layer in self.modules()):
            words = "whose activations and residuals are lost (use convblocks.convert_sync_batchnorm)"
            raise RuntimeError(f"{self.name}: expected norms with what follows them, got nn.SyncBatchNorm, {words}")
        return super().train(mode)

    @abstractmethod
    def trunk(self) -> list[list[Any]]:
        """Layers that are applied in turn; each list ends in a map of its own resolution or purpose."""

    def forward_head(self, x: Tensor) -> Tensor:
        """From the last map to the classes: the mean of its pixels, ``drop``, and the first of ``head_layers``."""
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        classes: Tensor = getattr(self, self.head_layers[0])(self.drop(pooled))
        return classes

    def without_head(self) -> Network:
        """Makes it return the map at the end of each stage, a list; its head is deleted."""
        for layer in self.head_layers:
            delattr(self, layer)
        self.features_only = True
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map."""
        return restored(self.last_map(x), x)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The map at the end of each stage."""
        return [restored(y, x) for y in self.maps(x)]

    def last_map(self, x: Tensor) -> Tensor:
        """The last map, laid out as it was computed."""
        self.check(x)
        x = self.arranged(x)
        for stage in self._with_containers(self.trunk()):
            x = run_layers(stage, x)
        return x

    def arranged(self, x: Tensor) -> Tensor:
        """x as inference lays it out; in training as it is, whose dropout goes by the order of memory."""
        return x if self.training else arranged(x)

    def _with_containers(self, stages: list[list[Any]]) -> list[list[Any]]:
        """The stages; where someone looks on at a container of their layers, with it in the place of these."""
        for container in self.children():
            if not isinstance(container, nn.Sequential) or is_plain(container, type(container)):
                continue
            row = [layer for stage in stages for layer in stage]
            inner = list(container)
            first = next((i for i, layer in enumerate(row) if inner and layer is inner[0]), len(row))
            if list(map(id, row[first : first + len(inner)])) == list(map(id, inner)):
                stages = [row[:first], [container], row[first + len(inner) :]]
        return stages

    def maps(self, x: Tensor) -> list[Tensor]:
        """The map at the end of each stage, laid out as it was computed."""
        self.check(x)
        x = self.arranged(x)
        maps = []
        for stage in self.trunk():
            for layers in self._with_containers([stage]):
                x = run_layers(layers, x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            return self.forward_maps(x)
        return self.forward_head(self.last_map(x))

    def feature_info(self) -> list[tuple[int, int]]:
        """Of the map at the end of each stage: channels, and how many of the image's pixels one stands for each way.

        From runs without numbers: how much each map grows with the image.
        """
        maps, found, sizes = _Maps(self), [], []
        tensors = {f"network.{k}": t.to("meta") for k, t in self.state_dict(keep_vars=True).items()}
        with torch.no_grad():
            for least in (max(256, 2 * self.least_size), 2 * max(256, 2 * self.least_size)):
                sizes.append(next(n for n in count(32 * -(-least // 32)) if self._takes(n)))
                found.append(torch.func.functional_call(maps, tensors, self._image(sizes[-1])))
        more = sizes[1] - sizes[0]
        return [(a.shape[1], round(more / (b.shape[2] - a.shape[2]))) for a, b in zip(*found, strict=True)]

    def _image(self, size: int) -> Tensor:
        return torch.empty(2, self.in_channels, size, size, device="meta")

    def _takes(self, size: int) -> bool:
        try:
            self.check(self._image(size))
        except ValueError:
            return False
        return True

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
        for layer in outside_attention(self):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


class _Maps(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.forward_maps(x)


class SegmentationNetwork(Network):
    """Base of the networks that give classes to pixels, from all maps of the trunk.

    A subclass gives ``decode`` instead of ``forward_head``.
    """

    @abstractmethod
    def decode(self, maps: list[Tensor], height: int, width: int) -> Any:
        """From the maps of the trunk to the classes of the pixels of an image of this size."""

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            return self.forward_maps(x)
        y = self.decode(self.maps(x), x.shape[2], x.shape[3])
        return restored(y, x) if isinstance(y, Tensor) else y


class EncoderDecoder(SegmentationNetwork):
    """Base of those whose trunk is a network of maps, their child ``encoder_name``."""

    encoder_name: ClassVar[str]

    def trunk(self) -> list[list[Any]]:
        layers: list[list[Any]] = getattr(self, self.encoder_name).trunk()
        return layers

    def maps(self, x: Tensor) -> list[Tensor]:
        self.check(x)
        encoder, x = getattr(self, self.encoder_name), self.arranged(x)
        maps: list[Tensor] = encoder.maps(x) if is_plain(encoder, type(encoder)) else encoder(x)
        return maps


def classifier(channels: int, num_classes: int, bias: bool = True) -> nn.Module:
    return nn.Linear(channels, num_classes, bias) if num_classes else nn.Identity()
