from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.channel_attention import reference
from convblocks.ops.gate import ACTIVATIONS, GATES


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    c, ones = size[1], (1, 1) if o.get("conv") else ()
    r = max(1, c // o.get("reduction", 4))
    w1, w2 = random(r, c, *ones, scale=c**-0.5 * 2), random(c, r, *ones, scale=r**-0.5)
    b1, b2 = (random(r, scale=0.5), random(c, scale=0.5)) if o.get("bias", True) else (None, None)
    return (w1, b1, w2, b2), {k: v for k, v in o.items() if k in ("activation", "gate")}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "channel_attention"
    x = torch.zeros(2, 8, 7, 7, device=device)
    w1, b1, w2, b2 = (torch.zeros(s, device=device) for s in ((4, 8), (4,), (8, 4), (8,)))
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, w1, b1, w2, b2), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    yield refuse(x, None, b1, w2, b2, error=TypeError, expected="w1 to be a tensor, got None")
    yield refuse(x, w1, b1, None, b2, error=TypeError, expected="w2 to be a tensor, got None")
    for wrong in (w1[:, :7], w1[:0], w1[0], w1[:, :, None]):
        words = f"w1 of size [R, 8] or [R, 8, 1, 1], got {list(wrong.shape)}"
        yield refuse(x, wrong, b1, w2, b2, expected=words)
    yield refuse(x, w1, b1[:3], w2, b2, expected="b1 of size [4], got [3]")
    yield refuse(x, w1, b1, w2.T, b2, expected="w2 of size [8, 4] or [8, 4, 1, 1], got [4, 8]")
    yield refuse(x, w1, b1, w2, b2[None], expected="b2 of size [8], got [1, 8]")
    yield refuse(x, w1.double(), b1, w2, b2, error=TypeError, expected="w1 of dtype float32, got float64")
    mixed, words = w2.bfloat16(), "w2 of dtype float32 like w1, got bfloat16"
    yield refuse(x.bfloat16(), w1, b1, mixed, b2, error=TypeError, expected=words)
    words = f"w2 on {x.device} like the input, got meta"
    yield refuse(x, w1, b1, w2.to("meta"), b2, error=RuntimeError, expected=words)
    names = f"activation to be one of {', '.join(ACTIVATIONS)}, got swish"
    yield refuse(x, w1, b1, w2, b2, expected=names, activation="swish")
    yield refuse(x, w1, b1, w2, b2, expected=f"gate to be one of {', '.join(GATES)}, got tanh", gate="tanh")
    words = "at least one pixel to take the maximum of, got an input of size [2, 8, 0, 7]"
    yield refuse(x[:, :, :0], w1, b1, w2, b2, expected=words)


def _mlp_macs(sample: Sample) -> int:
    return 2 * sample.x.shape[0] * sum(t.numel() for t in sample.parameters() if t.dim() > 1)


def _memory(sample: Sample) -> int:
    """What is pooled, what the layers make of it, and how many pixels have each maximum; and whether they are there."""
    (n, c), r = sample.x.shape[:2], sample.args[1].shape[0]
    return int(n * (4 * c + 3 * r) + 1)


INFO = OpInfo(
    name="channel_attention",
    op=ops.channel_attention,
    reference=reference,
    parameters=_parameters,
    options=(
        {"conv": True},
        {"bias": False, "reduction": 1, "activation": "silu"},
        {"activation": "gelu", "gate": "hardsigmoid"},
    ),
    bench=({"conv": True, "reduction": 16},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * s.x.numel() + 2 * _mlp_macs(s),
    backward_flops=lambda s: 4 * s.x.numel() + 6 * _mlp_macs(s),
    memory=_memory,
    gpu_traffic=(1.2, 1.75),  # backward: reads the map twice, and writes it once
)
