from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size, bad_maps
from convblocks.ops.concat_shuffle import reference


def _maps(size: Size, o: Options) -> list[Size]:
    """``size`` is that of the output. Equal maps where its channels allow; fewer than wanted rather than empty ones."""
    n, c, h, w = size
    count = min(o["maps"], c)
    cuts = [c * i // count for i in range(count + 1)]
    return [(n, end - start, h, w) for start, end in itertools.pairwise(cuts)]


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    groups = math.gcd(size[1], o["groups"])
    return (size[1] // groups if o.get("inverse") else groups,), {}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    x, y = torch.zeros(2, 8, 7, 7, device=device), torch.zeros(2, 4, 7, 7, device=device)
    op = "concat_shuffle: expected "
    yield BadInput(([], 2), {}, ValueError, op + "at least one map, got an empty list")
    for bad, error, words in bad_maps("concat_shuffle", x):
        yield BadInput(([bad, y], 2), {}, error, words)
        yield BadInput(([y, bad], 2), {}, error, words)
    for groups in (5, 24, 0, -2):
        yield BadInput(([x, y], groups), {}, ValueError, op + f"groups that divide the 12 channels, got {groups}")
    for other in (x[:1], x[:, :, :6], x[..., :6]):
        words = f"maps of size [2, *, 7, 7] like the first, got {list(other.shape)}"
        yield BadInput(([y, x, other], 2), {}, ValueError, op + words)
    words = "maps of dtype float32 like the first, got "
    yield BadInput(([x, y.double()], 2), {}, TypeError, op + words + "float64")
    yield BadInput(([x, y.bfloat16()], 2), {}, TypeError, op + words + "bfloat16")
    words = f"maps on {x.device} like the first, got meta"
    yield BadInput(([x, y.to("meta")], 2), {}, RuntimeError, op + words)


def _bad_gradients(device: str) -> Iterator[BadInput]:
    grad = torch.zeros(2, 12, 7, 7, device=device)
    for bad, error, words in bad_maps("concat_shuffle", grad):
        yield BadInput((bad, [8, 4], 2), {}, error, words)
    for channels in ([8, 3], [8], [], [16, -4]):
        words = f"concat_shuffle: expected channels that add up to the 12 of the gradient, got {channels}"
        yield BadInput((grad, channels, 2), {}, ValueError, words)
    for groups in (5, 24, 0, -2):
        words = f"concat_shuffle: expected groups that divide the 12 channels, got {groups}"
        yield BadInput((grad, [8, 4], groups), {}, ValueError, words)


INFO = OpInfo(
    name="concat_shuffle",
    op=ops.concat_shuffle,
    reference=reference,
    parameters=_parameters,
    maps=_maps,
    options=(
        {"maps": 2, "groups": 2},
        {"maps": 1, "groups": 2},
        {"maps": 3, "groups": 2},
        {"maps": 2, "groups": 4},
        {"maps": 2, "groups": 4, "inverse": True},
        {"maps": 11, "groups": 3, "inverse": True},
        {"maps": 12, "groups": 7},
    ),
    bench=({"maps": 2, "groups": 2},),
    bad_inputs=_bad_inputs,
    bad_gradients=_bad_gradients,
    forward_flops=lambda s: 0,
    backward_flops=lambda s: 0,
    gpu_traffic=(1.05, 1.05),
    linear=True,
)
