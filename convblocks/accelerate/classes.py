"""All rules, and the home of the classes made from them: unpickling a replaced module looks for its class here."""

from __future__ import annotations

from torch import nn

from convblocks.accelerate import folded, segmentation_models_pytorch, timm, torch, torchvision
from convblocks.accelerate.rule import BACKENDS, replacement

RULES = {
    rule.source: rule for library in (torch, timm, torchvision, segmentation_models_pytorch) for rule in library.RULES
}


def __getattr__(name: str) -> type[nn.Module]:
    for rule in (*RULES.values(), *folded.RULES.values()):
        for backend in BACKENDS:
            if name == (rule.name if backend == "auto" else f"{rule.name}_{backend}"):
                return replacement(rule, backend)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
