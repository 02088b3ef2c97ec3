from __future__ import annotations

from collections.abc import Iterator

import torch

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, bad_maps
from convblocks.ops.simam import reference


def _bad_inputs(device: str) -> Iterator[BadInput]:
    x = torch.zeros(2, 8, 7, 7, device=device)
    for bad, error, words in bad_maps("simam", x):
        yield BadInput((bad,), {}, error, words)
    for value in (0.0, -1.0, float("nan")):
        yield BadInput((x, value), {}, ValueError, f"simam: expected e_lambda > 0, got {value:g}")


INFO = OpInfo(
    name="simam",
    op=ops.simam,
    reference=reference,
    parameters=lambda size, o, random: ((), dict(o)),
    options=({"e_lambda": 1e-4}, {"e_lambda": 0.1}),
    bench=({"e_lambda": 1e-4},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 9 * s.x.numel(),
    backward_flops=lambda s: 18 * s.x.numel(),
    gpu_traffic=(1.05, 1.05),
)
