"""What the networks share that are torchvision's ``features`` and ``classifier``, and how timm's keys become theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.attention import outside_attention
from convblocks.blocks.convert import StateDict, Step
from convblocks.models.network import Network

# What timm calls the layers of its blocks, in their order. Of the norms, the first follows the first convolution, ...
_TIMM = (("conv_pw", "conv_dw", "se", "conv_pwl"), ("conv_dw", "se", "conv_pw"), ("conv_exp", "conv_pwl"), ("conv",))
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)(\..+)")


def _in_branch(names: set[str], flat: bool) -> dict[str, str]:
    """Where the layers of a block of timm's are in a branch of torchvision's, in which ``flat`` ends in a norm."""
    order: tuple[str, ...] = next((o for o in _TIMM if names >= {*o} - {"se"}), ())
    to, norms = {}, 0
    for i, layer in enumerate(name for name in order if name in names and (name != "se" or not flat)):
        if layer == "se":
            to[layer] = str(i)
            continue
        norms += 1
        end = flat and layer == order[-1]
        to[layer], to[f"bn{norms}"] = (str(i), str(i + 1)) if end else (f"{i}.0", f"{i}.1")
    return to


def timm_step(branch: str, *, flat: bool = False, nested: bool = False) -> Step:
    """A step that makes torchvision's ``features`` of timm's stem, blocks and ``conv_head``.

    ``nested``: a stage is one of the features, not each block.
    """

    def step(sd: StateDict) -> StateDict:
        found = [(_IN_BLOCK.fullmatch(key), key, value) for key, value in sd.items()]
        blocks: dict[tuple[int, int], set[str]] = {}
        for m, _, _ in found:
            if m:
                blocks.setdefault((int(m[1]), int(m[2])), set()).add(m[3])
        if not blocks:
            return sd
        last = max(blocks)[0] + 2 if nested else len(blocks) + 1
        outside = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": f"{last}.0", "bn2": f"{last}.1"}
        to = {name: f"features.{place}" for name, place in outside.items()}
        for k, (block, names) in enumerate(sorted(blocks.items()), 1):
            i, j = block
            place = f"features.{i + 1}.{j}.{branch}" if nested else f"features.{k}.{branch}"
            inside = _in_branch(names, flat)
            if "conv" in names and not nested:  # no block: MobileNetV3's last convolution
                place, inside = f"features.{k}", {"conv": "0", "bn1": "1"}
            to |= {f"blocks.{i}.{j}.{name}": f"{place}.{inside.get(name, name)}" for name in names}
        converted = {}
        for m, key, value in found:
            layer, rest = (key[: m.start(4)], m[4]) if m else (key.partition(".")[0], key[len(key.partition(".")[0]) :])
            converted[to.get(layer, layer) + rest] = value
        return converted

    return step


def classifier_step(old: str, new: str) -> Step:
    """A step for a layer of timm's head, perhaps a 1x1 convolution, that is a linear one of torchvision's."""

    def step(sd: StateDict) -> StateDict:
        converted = {}
        for key, value in sd.items():
            if key in (f"{old}.weight", f"{old}.bias"):
                key = new + key.removeprefix(old)
                value = value.flatten(1) if isinstance(value, Tensor) and value.dim() > 2 else value
            converted[key] = value
        return converted

    return step


class FeaturesNetwork(Network):
    """Base of the networks that are ``features``, then a ``classifier`` of the means of the last map."""

    head_layers = ("classifier",)
    native = "torchvision"
    features: nn.Sequential
    classifier: nn.Module
    starts: Sequence[int]  # of the stages, which of the features is the first

    def trunk(self) -> list[list[Any]]:
        layers = list(self.features)
        return [layers[a:b] for a, b in zip(self.starts, (*self.starts[1:], len(layers)), strict=True)]

    def forward_head(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return y

    def initialise(self) -> None:
        """As torchvision does: as He et al., and linear layers from a normal distribution."""
        super().initialise()
        for layer in outside_attention(self):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)


_UNIT = re.compile(r"features\.stage(\d+)\.unit(\d+)\.conv(\d)\.(conv|bn)\.(.+)")


def pytorchcv_mobilenet_v2(sd: StateDict) -> StateDict:
    """The step for pytorchcv's mobilenetv2b, whose classifier is a convolution without a bias."""
    found = [(_UNIT.fullmatch(key), key, value) for key, value in sd.items()]
    firsts: dict[tuple[int, int], int] = {}
    for m, _, _ in found:
        if m:
            unit = int(m[1]), int(m[2])
            firsts[unit] = min(int(m[3]), firsts.get(unit, 3))
    if not firsts:
        return sd
    places = {unit: k for k, unit in enumerate(sorted(firsts), 1)}
    converted = {}
    for m, key, value in found:
        if m:
            unit, conv, is_norm = (int(m[1]), int(m[2])), int(m[3]), int(m[4] == "bn")
            i = conv - firsts[unit]
            key = f"features.{places[unit]}.conv.{i + is_norm if conv == 3 else f'{i}.{is_norm}'}.{m[5]}"
        elif key == "output.weight":
            key, value = "classifier.1.weight", value.flatten(1)
            converted["classifier.1.bias"] = value.new_zeros(len(value))
        for old, place in (("init_block", 0), ("final_block", len(firsts) + 1)):
            for i, layer in enumerate(("conv", "bn")):
                if key.startswith(f"features.{old}.{layer}."):
                    key = f"features.{place}.{i}." + key.rpartition(".")[2]
        converted[key] = value
    return converted
