from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, StateDict
from convblocks.blocks.inverted_residual import FusedMBConv, MBConv
from convblocks.models.features import FeaturesNetwork, classifier_step, timm_step
from convblocks.models.network import classifier
from convblocks.models.registry import register

_IN_ROW = ("expand_conv", "dwconv", "se", "project_conv")
_IN_LAYER = {"conv": "0", "bn": "1", "conv_reduce": "fc1", "conv_expand": "fc2"}
_ROW = re.compile(rf"(blocks\.(\d+)\.({'|'.join(_IN_ROW)})|stem|head\.project_conv)\.(\w+)\.(\w+)")


def _row_step(sd: StateDict) -> StateDict:
    """The step for blocks in one row; a stage begins where the channels change."""
    found = [(_ROW.fullmatch(key), key, value) for key, value in sd.items()]
    blocks: dict[int, set[str]] = {}
    for m, _, _ in found:
        if m and m[2]:
            blocks.setdefault(int(m[2]), set()).add(m[3])
    if not blocks:
        return sd
    to: dict[str, str] = {}
    stage, i, before = 0, 0, 0
    for block, names in sorted(blocks.items()):
        out = len(sd.get(f"blocks.{block}.project_conv.conv.weight", ()))
        stage, i, before = (stage, i + 1, out) if out == before else (stage + 1, 0, out)
        for k, name in enumerate(name for name in _IN_ROW if name in names):
            to[f"blocks.{block}.{name}"] = f"features.{stage}.{i}.block.{k}"
    to |= {"stem": "features.0", "head.project_conv": f"features.{stage + 1}"}
    converted = {}
    for m, key, value in found:
        if m:
            key = f"{to[m[1]]}.{_IN_LAYER.get(m[4], m[4])}.{m[5]}"
        converted[key.replace("head.classifier.", "classifier.1.")] = value
    return converted


class EfficientNetV2(FeaturesNetwork):
    """EfficientNetV2: dense blocks in the first stages, then MBConv with squeeze-excite.

    Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", arXiv 2104.00298. The keys of the state dict are
    those of torchvision; those of WZMIAOMIAO's (deep-learning-for-image-processing) are read, and those of timm's
    efficientnetv2_s, _m and _l, whose norms have ``norm_eps=1e-5``.

    Args:
        settings: of each stage: whether it is dense, the factor of the expansion, channels, blocks, and the stride of
            the first.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: in each MBConv, after the depthwise convolution: a name ("se": as published), what makes a module for
            C channels, or None.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training, nearly; it grows from 0
            on.
        norm_eps, norm_momentum: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.efficientnet_v2_s(num_classes=10, attention="eca").eval()
        >>> y = model(torch.randn(1, 3, 64, 64))
    """

    layouts = (
        Layout("timm", (classifier_step("classifier", "classifier.1"), timm_step("block", nested=True))),
        Layout("wzmiaomiao", (_row_step,)),
    )

    def __init__(
        self,
        settings: Sequence[tuple[bool, int, int, int, int]],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = "se",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__(num_classes, in_channels)
        norm: dict[str, Any] = {"eps": norm_eps, "momentum": norm_momentum}
        conv = partial(ConvNormAct, activation="silu", eps=norm_eps, momentum=norm_momentum, names=("0", "1"))
        channels, last, made = settings[0][2], 1280, 0
        stages: list[nn.Module] = [conv(in_channels, channels, 3, 2)]
        starts, total = [0], sum(count for _, _, _, count, _ in settings)
        for fused, expand, out, count, stride in settings:
            starts += [len(stages)] if stride == 2 else []
            blocks: list[nn.Module] = []
            for i in range(count):
                own: dict[str, Any] = norm | {"drop_path": drop_path_rate * made / total}
                shape = channels, out, stride if i == 0 else 1, expand
                blocks.append(FusedMBConv(*shape, **own) if fused else MBConv(*shape, attention=attention, **own))
                channels, made = out, made + 1
            stages.append(nn.Sequential(*blocks))
        self.starts = starts
        self.features = nn.Sequential(*stages, conv(channels, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), classifier(last, num_classes))
        self.initialise()

    def initialise(self) -> None:
        """As the authors do: linear layers from a uniform distribution."""
        super().initialise()
        for layer in outside_attention(self):
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.out_features)
                nn.init.uniform_(layer.weight, -bound, bound)


_S = (
    (True, 1, 24, 2, 1),
    (True, 4, 48, 4, 2),
    (True, 4, 64, 4, 2),
    (False, 4, 128, 6, 2),
    (False, 6, 160, 9, 1),
    (False, 6, 256, 15, 2),
)
_M = (
    (True, 1, 24, 3, 1),
    (True, 4, 48, 5, 2),
    (True, 4, 80, 5, 2),
    (False, 4, 160, 7, 2),
    (False, 6, 176, 14, 1),
    (False, 6, 304, 18, 2),
    (False, 6, 512, 5, 1),
)
_L = (
    (True, 1, 32, 4, 1),
    (True, 4, 64, 7, 2),
    (True, 4, 96, 7, 2),
    (False, 4, 192, 10, 2),
    (False, 6, 224, 19, 1),
    (False, 6, 384, 25, 2),
    (False, 6, 640, 7, 1),
)

register(
    EfficientNetV2,
    {
        "efficientnet_v2_s": {"settings": _S, "drop_rate": 0.2, "image_size": 384},
        "efficientnet_v2_m": {"settings": _M, "drop_rate": 0.3, "image_size": 480},
        "efficientnet_v2_l": {"settings": _L, "drop_rate": 0.4, "image_size": 480},
    },
)
