from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.global_context import PARAMETERS, TRANSFORMS, reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    c, ones, pixel = size[1], (1, 1) if o.get("conv") else (), (1, 1) if o.get("planes") else ()
    r = max(1, c // o["reduction"]) if "reduction" in o else max(3, c // 2 + 2)

    def transform(wanted: bool) -> tuple[Tensor | None, ...]:
        if not wanted:
            return (None,) * 6
        # A small w1, so that float16 holds the gradients: the norm divides them by the size of what it is given.
        w1, b1 = random(r, c, *ones, scale=c**-0.5 * 0.005), random(r, scale=0.3)
        norm = 1 + random(r, *pixel, scale=0.3), random(r, *pixel, scale=0.3)
        return w1, b1, *norm, random(c, r, *ones, scale=r**-0.5 * 2), random(c, scale=0.5)

    attention, bias = o.get("attention", True), o.get("bias", True)
    weight = random(1, c, *ones, scale=c**-0.5 * 2) if attention else None
    attn_bias = random(1) if attention and bias else None
    both = (t for name in TRANSFORMS for t in transform(o["fuse"] in (name, "both")))
    return (weight, attn_bias, *both), {k: v for k, v in o.items() if k in ("eps", "activation", "gate")}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "global_context"
    x = torch.zeros(2, 8, 7, 7, device=device)
    sizes = {"w1": (4, 8), "b1": (4,), "norm_weight": (4,), "norm_bias": (4,), "w2": (8, 4), "b2": (8,)}
    good: dict[str, Tensor | None] = dict.fromkeys(PARAMETERS)
    good |= {f"add_{name}": torch.zeros(size, device=device) for name, size in sizes.items()}
    good |= {"attn_weight": torch.zeros(1, 8, device=device), "attn_bias": torch.zeros(1, device=device)}
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, *good.values()), {}, error, words)

    def refuse(expected: str, error: type[Exception] = ValueError, *, like: Tensor = x, **changed: Any) -> BadInput:
        values = {**good, **{k: v for k, v in changed.items() if k in PARAMETERS}}
        kwargs = {k: v for k, v in changed.items() if k not in PARAMETERS}
        return BadInput((like, *values.values()), kwargs, error, f"{op}: expected {expected}")

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, device=device)

    none: dict[str, Any] = {name: None for name in good if name.startswith("add_")}
    yield refuse("the tensors of scale, of add or of both, got neither", **none)
    yield refuse("add_b1 with add_w1, got None", add_b1=None)
    yield refuse("add_w1 with add_b1, got None", add_w1=None)
    yield refuse("add_norm_bias with add_w1, got None", add_norm_bias=None)
    yield refuse("scale_w1 with scale_norm_weight, got None", scale_norm_weight=zeros(4))
    yield refuse("attn_weight of size [1, 8] or [1, 8, 1, 1], got [8]", attn_weight=zeros(8))
    yield refuse("attn_weight of size [1, 8] or [1, 8, 1, 1], got [1, 7]", attn_weight=zeros(1, 7))
    yield refuse("attn_bias of size [1], got [8]", attn_bias=zeros(8))
    yield refuse("attn_bias only with attn_weight, got attn_bias of size [1]", attn_weight=None)
    yield refuse("add_w1 of size [R, 8] or [R, 8, 1, 1], got [4, 7]", add_w1=zeros(4, 7))
    yield refuse("add_w1 of size [R, 8] or [R, 8, 1, 1], got [0, 8]", add_w1=zeros(0, 8))
    yield refuse("add_w1 of size [R, 8] or [R, 8, 1, 1], got [4, 8, 1]", add_w1=zeros(4, 8, 1))
    yield refuse("add_b1 of size [4], got [4, 1]", add_b1=zeros(4, 1))
    yield refuse("add_norm_weight of size [4] or [4, 1, 1], got [8]", add_norm_weight=zeros(8))
    yield refuse("add_norm_bias of size [4] or [4, 1, 1], got [4, 1]", add_norm_bias=zeros(4, 1))
    yield refuse("add_w2 of size [8, 4] or [8, 4, 1, 1], got [4, 8]", add_w2=zeros(4, 8))
    yield refuse("add_b2 of size [8], got [4]", add_b2=zeros(4))
    double = zeros(1, 8).double()
    yield refuse("attn_weight of dtype float32, got float64", TypeError, attn_weight=double)
    half = x.to(torch.bfloat16)
    yield refuse("attn_weight of dtype bfloat16 or float32, got float64", TypeError, like=half, attn_weight=double)
    mixed = zeros(4).to(torch.bfloat16)
    words = "add_b1 of dtype float32 like attn_weight, got bfloat16"
    yield refuse(words, TypeError, like=half, add_b1=mixed)
    words = f"add_w2 on {x.device} like the input, got meta"
    yield refuse(words, RuntimeError, add_w2=zeros(8, 4).to("meta"))
    yield refuse(f"activation to be one of {', '.join(ACTIVATIONS)}, got swish", activation="swish")
    yield refuse(f"gate to be one of {', '.join(GATES)}, got tanh", gate="tanh")


def _macs(sample: Sample) -> int:
    """Of the transforms."""
    return sample.x.shape[0] * sum(t.numel() for t in sample.parameters() if t.dim() > 1 and t.shape[0] > 1)


def _memory(sample: Sample) -> int:
    """The contexts and, where it is not the mean, attention, and whether they are there."""
    n, c, h, w = sample.x.shape
    return n * (c + (0 if sample.args[1] is None else h * w)) + 1


INFO = OpInfo(
    name="global_context",
    op=ops.global_context,
    reference=reference,
    parameters=_parameters,
    options=(
        {"fuse": "add", "conv": True, "planes": True},
        {"fuse": "scale", "activation": "silu", "eps": 1e-6},
        {"fuse": "both", "activation": "gelu", "gate": "hardsigmoid", "conv": True},
        {"fuse": "both", "activation": "leaky_relu", "attention": False},
        {"fuse": "scale", "activation": "hardswish", "bias": False, "reduction": 8},
    ),
    bench=({"fuse": "add", "conv": True, "reduction": 8}, {"fuse": "scale", "conv": True, "reduction": 8}),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 6 * s.x.numel() + 2 * _macs(s),
    backward_flops=lambda s: 18 * s.x.numel() + 6 * _macs(s),
    memory=_memory,
    gpu_traffic=(1.8, 2.0),  # two reads and a write; backward: x and grad, both again, and a write: 1.2 times that
)
