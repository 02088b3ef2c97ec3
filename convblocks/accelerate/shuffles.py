"""Rules for the channel shuffle of torch and the units of ShuffleNet V2, which end in a concatenation and one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.accelerate.rule import Forward, Refused, Rule, Run, child
from convblocks.ops.checks import FLOATING
from convblocks.ops.concat_shuffle import reference

# The branches of a unit of stride 1, whose first one is empty, and of a longer one.
_FIRST = (nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
_SECOND = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


def _fits(maps: Sequence[Tensor]) -> bool:
    """Whether the operation takes what torch takes. Names in a graph have no dtype yet: they are taken to fit."""
    if isinstance(maps[0], torch.fx.Proxy):
        return True
    return all(t.dim() == 4 and t.dtype in FLOATING and t.dtype == maps[0].dtype for t in maps)


def channel_shuffle(name: str, source: str) -> Rule:
    def fused_forward(run: Run) -> Forward:
        def forward(self: Any, input: Tensor) -> Tensor:
            return run(input, self.groups) if _fits([input]) else self.unfused(input)

        return forward

    def check(module: Any) -> None:
        if type(module.groups) is not int or module.groups < 1:
            raise Refused(f"groups is {module.groups!r}")

    return Rule(name, source, "channel_shuffle", fused_forward, lambda module: 2 * module.groups, check, options={})


def shuffle_unit(name: str, source: str) -> Rule:
    """A rule for units with ``branch1``, ``branch2`` and a ``stride``, which call their branches as before."""

    def fused_forward(run: Run) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            if self.stride == 1:
                left, right = x.chunk(2, dim=1)
            else:
                left, right = self.branch1(x), x
            parts = [left, self.branch2(right)]
            return run(parts, 2) if _fits(parts) else reference(parts, 2)  # torch promotes dtypes that differ

        return forward

    def check(module: Any) -> None:
        for branch, layers in (("branch1", () if module.stride == 1 else _FIRST), ("branch2", _SECOND)):
            if tuple(map(type, child(module, branch, nn.Sequential))) != layers:
                raise Refused(f"{branch} is not as its class makes it")

    def channels(module: Any) -> int:
        taken: int = module.branch2[0].in_channels
        return 2 * taken if module.stride == 1 else taken

    return Rule(name, source, "concat_shuffle", fused_forward, channels, check, options={}, calls_children=True)
