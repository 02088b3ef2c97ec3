from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size, bad_maps
from convblocks.ops.channel_pool import reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    return (torch.sigmoid(random(*size[:2], 1, 1)) if o["channel"] else None,), {}


def _per_sample(x: Tensor) -> tuple[Tensor]:
    return (x.mean((2, 3), keepdim=True).sigmoid(),)


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "channel_pool"
    x, c = torch.zeros(2, 8, 7, 5, device=device), torch.zeros(2, 8, 1, 1, device=device)
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, c), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str) -> BadInput:
        return BadInput(args, {}, error, f"{op}: expected {expected}")

    yield refuse(x[:, :0], None, expected="at least one channel, got an input of size [2, 0, 7, 5]")
    for wrong in (c[:1], c[:, :7], c[..., 0], x):
        yield refuse(x, wrong, expected=f"channel of size [2, 8, 1, 1], got {list(wrong.shape)}")
    half, single = x.bfloat16(), "float32, got float64"
    yield refuse(x, c.double(), error=TypeError, expected=f"channel of dtype {single}")
    yield refuse(half, c.double(), error=TypeError, expected=f"channel of dtype bfloat16 or {single}")
    words = f"channel on {x.device} like the input, got meta"
    yield refuse(x, c.to("meta"), error=RuntimeError, expected=words)


INFO = OpInfo(
    name="channel_pool",
    op=ops.channel_pool,
    reference=reference,
    parameters=_parameters,
    options=({"channel": True}, {"channel": False}),
    per_sample=_per_sample,
    bench=({"channel": True},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 3 * s.x.numel(),
    backward_flops=lambda s: 7 * s.x.numel(),
    memory=lambda s: 2 * s.x[:, 0].numel() + 1,  # maxima and how many channels have them, and whether they are there
    traffic_channels=64,
    gpu_traffic=(1.2, 1.7),  # backward: reads the map twice, and writes it once
)
