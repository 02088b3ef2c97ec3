from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size, bad_maps
from convblocks.ops.eca import PADDINGS, reference
from convblocks.ops.gate import GATES


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    k = o.get("k", 3)
    if o.get("padding") == "circular":
        k = min(k, 2 * size[1] + 1)
    bias = random(1) if o.get("bias") else None
    shape = (k,) if o.get("flat") else (1, 1, k)
    return (random(*shape, scale=2.0), bias), {n: v for n, v in o.items() if n in ("gate", "padding")}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    x, w = torch.zeros(2, 8, 7, 7, device=device), torch.zeros(1, 1, 3, device=device)
    for bad, error, words in bad_maps("eca", x):
        yield BadInput((bad, w), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"eca: expected {expected}")

    words = "weight of size [1, 1, k] or [k] with an odd k, got "
    yield refuse(x, torch.zeros(1, 1, 4, device=device), expected=words + "[1, 1, 4]")
    yield refuse(x, torch.zeros(1, 2, 3, device=device), expected=words + "[1, 2, 3]")
    yield refuse(x, torch.zeros(1, 3, device=device), expected=words + "[1, 3]")
    yield refuse(x, w, w.flatten(), expected="bias of size [1], got [3]")
    yield refuse(x, w.double(), error=TypeError, expected="weight of dtype float32, got float64")
    yield refuse(x, w.to("meta"), error=RuntimeError, expected=f"weight on {x.device} like the input, got meta")
    yield refuse(x, w, expected=f"gate to be one of {', '.join(GATES)}, got relu", gate="relu")
    yield refuse(x, w, expected=f"padding to be one of {', '.join(PADDINGS)}, got same", padding="same")
    wide = torch.zeros(1, 1, 19, device=device)
    words = "at least 9 channels for circular padding of a 19-tap weight, got 8"
    yield refuse(x, wide, expected=words, padding="circular")


INFO = OpInfo(
    name="eca",
    op=ops.eca,
    reference=reference,
    parameters=_parameters,
    options=(
        {"k": 3},
        {"k": 5, "padding": "circular"},
        {"k": 7, "bias": True, "gate": "hardsigmoid"},
        {"k": 1, "flat": True},
        {"k": 3, "padding": "circular", "bias": True},
    ),
    bench=({"k": 5},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * s.x.numel() + 2 * s.x.shape[0] * s.x.shape[1] * s.args[1].numel(),
    backward_flops=lambda s: 5 * s.x.numel() + 6 * s.x.shape[0] * s.x.shape[1] * s.args[1].numel(),
    gpu_traffic=(1.55, 1.5),
)
