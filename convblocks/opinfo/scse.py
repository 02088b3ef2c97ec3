from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.scse import MODES, reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    c = size[1]
    bias, ones = o.get("bias", True), (1, 1) if o.get("conv") else ()
    r = max(1, c // o.get("reduction", 4))
    w = random(1, c, *ones, scale=c**-0.5) if o.get("conv") else random(c, scale=c**-0.5)
    b = random(1, scale=0.5) if bias else None
    if o["mode"] == "spatial":
        return (None, None, None, None, w, b), {}
    w1, b1 = random(r, c, *ones, scale=c**-0.5 * 4), random(r, scale=0.5) if bias else None
    w2, b2 = random(c, r, *ones, scale=r**-0.5), random(c, scale=0.5) if bias else None
    return (w1, b1, w2, b2, w, b), {"mode": o["mode"]}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "scse"
    x = torch.zeros(2, 8, 7, 7, device=device)
    w1, b1, w2, b2, w, b = (torch.zeros(s, device=device) for s in ((4, 8), (4,), (8, 4), (8,), (8,), (1,)))
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, w1, b1, w2, b2, w, b), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput((x, *args) if len(args) == 6 else args, kwargs, error, f"{op}: expected {expected}")

    yield refuse(w1[:, :7], b1, w2, b2, w, b, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [4, 7]")
    yield refuse(w1[:0], b1[:0], w2[:, :0], b2, w, b, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [0, 8]")
    yield refuse(w1[0], b1, w2, b2, w, b, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [8]")
    yield refuse(w1[:, :, None], b1, w2, b2, w, b, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [4, 8, 1]")
    yield refuse(w1, b1[:3], w2, b2, w, b, expected="b1 of size [4], got [3]")
    yield refuse(w1, b1, w2.T, b2, w, b, expected="w2 of size [8, 4] or [8, 4, 1, 1], got [4, 8]")
    yield refuse(w1, b1, w2, b2[None], w, b, expected="b2 of size [8], got [1, 8]")
    for wrong in (w[:7], w[None, None], w[:, None], w[None, :, None], w[0], w1):
        words = f"w of size [8], [1, 8] or [1, 8, 1, 1], got {list(wrong.shape)}"
        yield refuse(w1, b1, w2, b2, wrong, b, expected=words)
        yield refuse(None, None, None, None, wrong, b, expected=words)
    for wrong in (b[0], b[None], b2):
        yield refuse(w1, b1, w2, b2, w, wrong, expected=f"b of size [1], got {list(wrong.shape)}")
    yield refuse(w1, b1, w2, b2, None, b, error=TypeError, expected="w to be a tensor, got None")
    yield refuse(w1, b1, None, b2, w, b, expected="w1 only with w2, got w1 of size [4, 8]")
    yield refuse(None, b1, w2, b2, w, b, expected="w2 only with w1, got w2 of size [8, 4]")
    yield refuse(None, b1, None, None, w, b, expected="b1 only with w1, got b1 of size [4]")
    yield refuse(None, None, None, b2, w, b, expected="b2 only with w2, got b2 of size [8]")
    double, on = w1.double(), f"on {x.device} like the input, got meta"
    yield refuse(double, b1, w2, b2, w, b, error=TypeError, expected="w1 of dtype float32, got float64")
    half, words = x.to(torch.bfloat16), "w1 of dtype bfloat16 or float32, got float64"
    yield refuse(half, double, b1, w2, b2, w, b, error=TypeError, expected=words)
    mixed, words = w1.to(torch.bfloat16), "w1 of dtype float32 like w, got bfloat16"
    yield refuse(half, mixed, None, w2, b2, w, b, error=TypeError, expected=words)
    yield refuse(w1, b1, w2, b2, w.to("meta"), b, error=RuntimeError, expected=f"w {on}")
    yield refuse(w1, b1, w2.to("meta"), b2, w, b, error=RuntimeError, expected=f"w2 {on}")
    yield refuse(w1, b1, w2, b2, w, b, expected=f"mode to be one of {', '.join(MODES)}, got sum", mode="sum")


def _macs(sample: Sample) -> int:
    """Of the layers and of the dot product of each pixel."""
    channel = sample.args[1:5]
    n, c, height, width = sample.x.shape
    layers: int = sum(t.numel() for t in channel if t is not None and t.dim() > 1)
    return n * layers + n * c * height * width


INFO = OpInfo(
    name="scse",
    op=ops.scse,
    reference=reference,
    parameters=_parameters,
    options=(
        {"mode": "add", "conv": True},
        {"mode": "add", "bias": False},
        {"mode": "max", "reduction": 2},
        {"mode": "mul"},
        {"mode": "concat"},
        {"mode": "spatial"},
    ),
    bench=({"mode": "add", "conv": True, "reduction": 16}, {"mode": "max", "reduction": 2}, {"mode": "spatial"}),
    bench_sizes=(  # the decoders of U-Nets and the networks of the papers, batch 1 and 8, and odd ones
        ((1, 64, 112, 112), (8, 256, 56, 56), (1, 512, 14, 14), (8, 672, 14, 14), (3, 100, 33, 31)),
    )
    * 3,
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 5 * s.x.numel() + 2 * _macs(s),
    backward_flops=lambda s: 10 * s.x.numel() + 6 * _macs(s),
    gpu_traffic=(1.8, 2.0),  # two reads and a write; backward: x and grad, both again, and a write
    largest=lambda o: {"add": 32000.0, "mul": 250.0}.get(o["mode"], 60000.0),  # x (s + q) and x^2 s q are larger than x
)
