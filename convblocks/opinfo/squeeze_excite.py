from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.squeeze_excite import reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    c = size[1]
    one_layer, bias, ones = o.get("one_layer", False), o.get("bias", True), (1, 1) if o.get("conv") else ()
    r = c if one_layer else max(1, c // o.get("reduction", 4))
    w1 = None if one_layer else random(r, c, *ones, scale=c**-0.5 * 4)
    b1 = None if one_layer or not bias else random(r, scale=0.5)
    w2, b2 = random(c, r, *ones, scale=r**-0.5), random(c, scale=0.5) if bias else None
    kwargs = {k: v for k, v in o.items() if k in ("activation", "gate", "add_maxpool")}
    return (w1, b1, w2, b2), kwargs


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "squeeze_excite"
    x = torch.zeros(2, 8, 7, 7, device=device)
    w1, b1, w2, b2 = (torch.zeros(s, device=device) for s in ((4, 8), (4,), (8, 4), (8,)))
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, w1, b1, w2, b2), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    yield refuse(x, w1[:, :7], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [4, 7]")
    yield refuse(x, w1[:0], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [0, 8]")
    yield refuse(x, w1[0], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [8]")
    yield refuse(x, w1[:, :, None], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [4, 8, 1]")
    yield refuse(x, w1, b1[:3], w2, b2, expected="b1 of size [4], got [3]")
    yield refuse(x, w1, b1, w2.T, b2, expected="w2 of size [8, 4] or [8, 4, 1, 1], got [4, 8]")
    yield refuse(x, w1, b1, None, b2, error=TypeError, expected="w2 to be a tensor, got None")
    yield refuse(x, None, None, w2, b2, expected="w2 of size [8, 8] or [8, 8, 1, 1], got [8, 4]")
    yield refuse(x, w1, b1, w2, b2[None], expected="b2 of size [8], got [1, 8]")
    yield refuse(x, None, b1, w2, b2, expected="b1 only with w1, got b1 of size [4]")
    double = w1.double()
    yield refuse(x, double, b1, w2, b2, error=TypeError, expected="w1 of dtype float32, got float64")
    half, words = x.to(torch.bfloat16), "w1 of dtype bfloat16 or float32, got float64"
    yield refuse(half, double, b1, w2, b2, error=TypeError, expected=words)
    mixed = w1.to(torch.bfloat16)
    yield refuse(half, mixed, None, w2, b2, error=TypeError, expected="w1 of dtype float32 like w2, got bfloat16")
    meta, words = w2.to("meta"), f"w2 on {x.device} like the input, got meta"
    yield refuse(x, w1, b1, meta, b2, error=RuntimeError, expected=words)
    names = f"activation to be one of {', '.join(ACTIVATIONS)}, got swish"
    yield refuse(x, w1, b1, w2, b2, expected=names, activation="swish")
    yield refuse(x, w1, b1, w2, b2, expected=f"gate to be one of {', '.join(GATES)}, got tanh", gate="tanh")
    words = "at least one pixel to take the maximum of, got an input of size [2, 8, 0, 7]"
    yield refuse(x[:, :, :0], w1, b1, w2, b2, expected=words, add_maxpool=True)


def _mlp_macs(sample: Sample) -> int:
    return sample.x.shape[0] * sum(t.numel() for t in sample.tensors()[1:] if t.dim() > 1)


INFO = OpInfo(
    name="squeeze_excite",
    op=ops.squeeze_excite,
    reference=reference,
    parameters=_parameters,
    options=(
        {"conv": True},
        {"bias": False},
        {"activation": "silu", "reduction": 1},
        {"activation": "gelu", "gate": "hardsigmoid"},
        {"activation": "gelu_tanh"},
        {"activation": "hardswish", "gate": "hardsigmoid", "conv": True},
        {"activation": "leaky_relu"},
        {"activation": "relu6"},
        {"one_layer": True, "gate": "hardsigmoid"},
        {"one_layer": True, "bias": False, "add_maxpool": True},
        {"add_maxpool": True},
    ),
    bench=({"conv": True, "reduction": 16},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * s.x.numel() + 2 * _mlp_macs(s),
    backward_flops=lambda s: 5 * s.x.numel() + 6 * _mlp_macs(s),
    gpu_traffic=(1.55, 1.5),  # two reads and a write; backward: x, grad, grad again, and a write
)
