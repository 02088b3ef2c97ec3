"""Res2Net: ``ResNet`` with blocks of its own.

Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", arXiv 1904.01169. The keys of the state dict are those
of the authors and of timm; the names ending in "d" are the authors' v1b.
"""

from __future__ import annotations

from typing import Any

from convblocks.blocks.res2net import Res2NetBottleneck
from convblocks.models.registry import register
from convblocks.models.resnet import ResNet

_DEPTHS: dict[str, dict[str, Any]] = {
    "50": {"block": Res2NetBottleneck, "layers": (3, 4, 6, 3)},
    "101": {"block": Res2NetBottleneck, "layers": (3, 4, 23, 3)},
}

register(
    ResNet,
    {
        f"res2net{depth}_{width}w_{scale}s": _DEPTHS[depth] | {"base_width": width, "scale": scale}
        for depth, width, scale in (
            ("50", 26, 4),
            ("50", 26, 6),
            ("50", 26, 8),
            ("50", 48, 2),
            ("50", 14, 8),
            ("101", 26, 4),
        )
    },
)
register(ResNet, {f"res2net{d}d": o | {"deep_stem": (32, 32), "avg_down": True} for d, o in _DEPTHS.items()})
register(ResNet, {"res2next50": _DEPTHS["50"] | {"base_width": 4, "groups": 8}})
