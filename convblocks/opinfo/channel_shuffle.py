from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size, bad_maps
from convblocks.ops.channel_shuffle import reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    groups = math.gcd(size[1], o["groups"])
    return (size[1] // groups if o.get("inverse") else groups,), {}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    x = torch.zeros(2, 8, 7, 7, device=device)
    for bad, error, words in bad_maps("channel_shuffle", x):
        yield BadInput((bad, 2), {}, error, words)
    for groups in (3, 16, 0, -2):
        words = f"channel_shuffle: expected groups that divide the 8 channels, got {groups}"
        yield BadInput((x, groups), {}, ValueError, words)


INFO = OpInfo(
    name="channel_shuffle",
    op=ops.channel_shuffle,
    reference=reference,
    parameters=_parameters,
    options=(
        {"groups": 2},
        {"groups": 3},
        {"groups": 2, "inverse": True},
        {"groups": 4, "inverse": True},
        {"groups": 7},
    ),
    bench=({"groups": 2},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 0,
    backward_flops=lambda s: 0,
    gpu_traffic=(1.05, 1.05),
    linear=True,
)
