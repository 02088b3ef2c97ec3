from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer
from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, StateDict, rename
from convblocks.blocks.fasternet import FasterNetBlock
from convblocks.blocks.fasternet import activation as _activation
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


def _blocks(found: re.Match[str]) -> str:
    return f"stages.{int(found[1]) // 2}.{found[2]}"


def _merging(found: re.Match[str]) -> str:
    return f"stages.{(int(found[1]) + 1) // 2}.downsample.{found[2]}"


_OFFICIAL = (
    rename(r"stages\.(\d)\.(blocks\..+)", _blocks),
    rename(r"stages\.(\d)\.((?:reduction|norm)\..+)", _merging),
    rename(r"avgpool_pre_head\.1\.(.+)", r"conv_head.\1"),
    rename(r"head\.(.+)", r"classifier.\1"),
)


def _from_official(sd: StateDict) -> StateDict:
    """The authors count the convolutions between the stages as stages. By these their keys can be told from timm's."""
    if "stages.1.reduction.weight" in sd:
        for step in _OFFICIAL:
            sd = step(sd)
    return sd


class FasterNet(Network):
    """FasterNet: blocks that convolve a part of the channels, and mix all of them pointwise.

    Chen et al., "Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks", arXiv 2303.03667. The keys of the
    state dict are those of timm; those of the authors are read, too.

    Args:
        width: channels of the first stage; each stage doubles them.
        layers: how many blocks each stage has.
        num_classes: 0: the pooled features, after the head's 1x1 convolution.
        in_channels: of the images.
        activation: of the blocks and the head: a name, a module, or a class or partial that makes one.
        attention: of what each block adds: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C
            channels, or None.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training; it grows from 0 on. Each
            network has the authors'.
        head_width: channels of the head's 1x1 convolution.
        **options: of ``FasterNetBlock``: ``n_div``, ``mlp_ratio``, ``layer_scale_init_value``, ``norm_layer``,
            ``pconv_fw_type``.

    Raises:
        ValueError: numbers out of range, an unknown activation or attention.

    Example:
        >>> model = convblocks.models.fasternet_t0(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("conv_head", "classifier")
    native = "timm"
    least_size = 32  # strides of as many pixels as their kernels have
    layouts = (Layout("official", (_from_official,)),)

    def __init__(
        self,
        width: int = 40,
        layers: Sequence[int] = (1, 2, 8, 2),
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        activation: Layer = "relu",
        attention: Attention = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_width: int = 1280,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, in_channels)
        self.patch_embed = _patches(in_channels, width, 4, "proj")
        stages: list[nn.Module] = []
        made, total = 0, sum(layers)
        for stage, count in enumerate(layers):
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            if stage:
                parts["downsample"] = _patches(width, width * 2, 2, "reduction")
                width *= 2
            blocks = []
            for _ in range(count):
                drop = drop_path_rate * made / max(1, total - 1)
                blocks.append(
                    FasterNetBlock(width, drop_path=drop, act_layer=activation, attention=attention, **options)
                )
                made += 1
            parts["blocks"] = nn.Sequential(*blocks)
            stages.append(nn.Sequential(parts))
        self.stages = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(width, head_width, 1, bias=False)
        self.act = _activation(activation)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(head_width, num_classes)
        self.initialise()

    def initialise(self) -> None:
        """As the authors: all layers from a truncated normal distribution, no bias."""
        for layer in outside_attention(self):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def trunk(self) -> list[list[Any]]:
        first, *others = self.stages
        return [[self.patch_embed, first], *([stage] for stage in others)]

    def forward_head(self, x: Tensor) -> Tensor:
        y = self.act(self.conv_head(nn.functional.adaptive_avg_pool2d(x, 1)))
        z: Tensor = self.classifier(self.drop(torch.flatten(y, 1)))
        return z


def _patches(channels: int, out: int, size: int, name: str) -> nn.Module:
    return ConvNormAct(channels, out, size, size, 0, activation="none", names=(name, "norm"))


register(
    FasterNet,
    {
        "fasternet_t0": {"width": 40, "activation": "gelu"},
        "fasternet_t1": {"width": 64, "activation": "gelu", "drop_path_rate": 0.02},
        "fasternet_t2": {"width": 96, "drop_path_rate": 0.05},
        "fasternet_s": {"width": 128, "layers": (1, 2, 13, 2), "drop_path_rate": 0.1},
        "fasternet_m": {"width": 144, "layers": (3, 4, 18, 3), "drop_path_rate": 0.2},
        "fasternet_l": {"width": 192, "layers": (3, 4, 18, 3), "drop_path_rate": 0.3},
    },
)
