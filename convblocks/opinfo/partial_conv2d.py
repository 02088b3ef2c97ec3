from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.partial_conv2d import reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    p, k = max(1, size[1] // o["n_div"]), o["k"]
    return (random(p, p, k, k, scale=0.5 / (p * k * k)),), {}  # small enough for sums of the largest halves


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "partial_conv2d"
    x, w = torch.zeros(2, 8, 7, 7, device=device), torch.zeros(4, 4, 3, 3, device=device)
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, w), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    wrong = torch.zeros(9, 9, 3, 3, device=device)
    for weight in (w[:, :3], w[:3], w[..., :2], w[..., :2, :2], w[0], w[:0, :0], w[:, :, :0, :0], wrong):
        words = f"weight of size [p, p, k, k] with p at most 8 and an odd k, got {list(weight.shape)}"
        yield refuse(x, weight, expected=words)
    yield refuse(x[..., :0], w, expected="at least one pixel, got an input of size [2, 8, 7, 0]")
    yield refuse(x, None, error=TypeError, expected="weight to be a tensor, got None")
    yield refuse(x, w.double(), error=TypeError, expected="weight of dtype float32, got float64")
    yield refuse(x, w.to("meta"), error=RuntimeError, expected=f"weight on {x.device} like the input, got meta")


def _macs(sample: Sample) -> int:
    n, _, h, w = sample.x.shape
    taps: int = sample.args[1].numel()
    return n * h * w * taps


INFO = OpInfo(
    name="partial_conv2d",
    op=ops.partial_conv2d,
    reference=reference,
    parameters=_parameters,
    options=({"n_div": 4, "k": 3}, {"n_div": 2, "k": 1}, {"n_div": 1, "k": 3}, {"n_div": 3, "k": 5}),
    bench=({"n_div": 4, "k": 3},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * _macs(s),
    backward_flops=lambda s: 4 * _macs(s),
    gpu_traffic=(1.4, 1.4),  # of what is around the convolution, where its last channel may end within a sector
    autocasts=True,
    by_torch="the convolution: on GPUs, in half precision, in place; that of its gradients",
)
