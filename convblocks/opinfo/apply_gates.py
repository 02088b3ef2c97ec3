from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size, bad_maps
from convblocks.ops.apply_gates import reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    n, c, h, w = size
    most = 0.05 if o.get("residual") else 1.0  # so that the largest halves stay finite
    channel = most * torch.sigmoid(random(n, c, 1, 1)) if "channel" in o["gates"] else None
    spatial = most * torch.sigmoid(random(n, 1, h, w)) if "spatial" in o["gates"] else None
    return (channel, spatial), {"residual": True} if o.get("residual") else {}


def _per_sample(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((2, 3), keepdim=True).sigmoid(), x.mean(1, keepdim=True).sigmoid()


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "apply_gates"
    x, c, s = (torch.zeros(size, device=device) for size in ((2, 8, 7, 5), (2, 8, 1, 1), (2, 1, 7, 5)))
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, c, s), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str) -> BadInput:
        return BadInput(args, {}, error, f"{op}: expected {expected}")

    yield refuse(x, None, None, error=TypeError, expected="channel or spatial to be a tensor, got None for both")
    for wrong in (c[:1], c[:, :7], c[..., 0], s):
        yield refuse(x, wrong, s, expected=f"channel of size [2, 8, 1, 1], got {list(wrong.shape)}")
    for wrong in (s[:1], s[:, 0], s[..., :4], c):
        yield refuse(x, c, wrong, expected=f"spatial of size [2, 1, 7, 5], got {list(wrong.shape)}")
    half, single, on = x.bfloat16(), "float32, got float64", f"on {x.device} like the input, got meta"
    yield refuse(x, c.double(), None, error=TypeError, expected=f"channel of dtype {single}")
    yield refuse(half, None, s.double(), error=TypeError, expected=f"spatial of dtype bfloat16 or {single}")
    words = "spatial of dtype float32 like channel, got bfloat16"
    yield refuse(half, c, s.bfloat16(), error=TypeError, expected=words)
    yield refuse(x, c.to("meta"), None, error=RuntimeError, expected=f"channel {on}")
    yield refuse(x, c, s.to("meta"), error=RuntimeError, expected=f"spatial {on}")


INFO = OpInfo(
    name="apply_gates",
    op=ops.apply_gates,
    reference=reference,
    parameters=_parameters,
    options=(
        {"gates": "channel spatial"},
        {"gates": "channel spatial", "residual": True},
        {"gates": "channel"},
        {"gates": "spatial", "residual": True},
    ),
    per_sample=_per_sample,
    bench=({"gates": "channel spatial"},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * s.x.numel(),
    backward_flops=lambda s: 6 * s.x.numel(),
    traffic_channels=64,
    gpu_traffic=(1.2, 1.2),
)
