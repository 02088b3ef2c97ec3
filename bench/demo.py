"""Accelerates four public networks in place, shows that they compute the same, and how long they take.

python -m bench.demo: the weights and batch-norm statistics are random, nothing is downloaded. It uses a GPU if there is
one. The exit status is 1 if a network does not agree with the untouched one, 2 if a library is missing.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import convblocks
from bench.timing import Timing
from convblocks.accelerate import Report

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm seresnet50": lambda: _library("timm").create_model("seresnet50"),
    "timm ecaresnet26t": lambda: _library("timm").create_model("ecaresnet26t"),
    "torchvision efficientnet_b0": lambda: _library("torchvision").models.efficientnet_b0(stochastic_depth_prob=0.0),
    "torchvision mobilenet_v3_large": lambda: _library("torchvision").models.mobilenet_v3_large(),
}
IMAGE = 224  # pixels a side where time is taken
CHECK = (4, 3, 96, 96)  # images on which results are compared
TIMES, FLOOR = 2.0, 1e-5  # an error may be TIMES that of the untouched network, and FLOOR


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        print(f"demo: expected {name} to be installed, got {e}: pip install timm torchvision rich", file=sys.stderr)
        sys.exit(2)


@dataclass
class Result:
    name: str
    report: Report
    errors: dict[str, tuple[float, float]]  # what: (relative error untouched, accelerated), against float64
    times: dict[int, tuple[Timing, Timing]]  # batch: (untouched, accelerated)

    @property
    def agrees(self) -> bool:
        return all(after <= TIMES * before + FLOOR for before, after in self.errors.values())


def _build(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with random batch-norm statistics, so that no block hides behind a zero; without dropout."""
    torch.manual_seed(0)
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.0, 0.2)
            nn.init.normal_(m.running_mean, 0.0, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
        elif isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def _results(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """The output in eval mode, and the output and gradients of a training step."""
    with torch.no_grad():
        output = model.eval()(x)
    x = x.clone().requires_grad_()
    y = model.train()(x)
    grad = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    grad_x, *grads = torch.autograd.grad(y, [x, *model.parameters()], grad)
    return {"output": [output], "training output": [y.detach()], "input gradient": [grad_x], "weight gradients": grads}


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    missed = sum((a.double() - b).square().sum().item() for a, b in zip(results, exact, strict=True))
    return float((missed / sum(b.square().sum().item() for b in exact)) ** 0.5)


if __name__ == "__main__":
    for name, make in NETWORKS.items():
        m = _build(make)
        for seed in range(3):
            torch.manual_seed(seed)
            u = copy.deepcopy(m)
            e = copy.deepcopy(m).double()
            a = copy.deepcopy(m)
            convblocks.accelerate(a)
            x = torch.randn(*CHECK)
            s = time.time()
            r = [_results(k, t) for k, t in ((u, x), (a, x), (e, x.double()))]
            print(
                name,
                time.time() - s,
                r[2]["output"][0].norm().item(),
                {k: (_error(r[0][k], r[2][k]), _error(r[1][k], r[2][k])) for k in r[0]},
            )
