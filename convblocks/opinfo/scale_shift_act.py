from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size, bad_maps
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.scale_shift_act import reference


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    kwargs: Options = {"activation": o["activation"]}
    if "residual" in o:
        kwargs["residual"] = random(*size)
    return (random(size[1], scale=0.4), random(size[1])), kwargs  # small enough for sums of the largest halves


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "scale_shift_act"
    x, s = torch.zeros(2, 8, 7, 7, device=device), torch.zeros(8, device=device)
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, s, s), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    half, double, meta = x.bfloat16(), s.double(), s.to("meta")
    on, single = f"on {x.device} like the input, got meta", "float32, got float64"
    for name, pair in (("scale", lambda t: (t, s)), ("shift", lambda t: (s, t))):
        yield refuse(x, *pair(None), error=TypeError, expected=f"{name} to be a tensor, got None")
        for wrong in (s[:7], s[None], s[0], s[:, None, None]):
            yield refuse(x, *pair(wrong), expected=f"{name} of size [8], got {list(wrong.shape)}")
        yield refuse(x, *pair(double), error=TypeError, expected=f"{name} of dtype {single}")
        yield refuse(half, *pair(double), error=TypeError, expected=f"{name} of dtype bfloat16 or {single}")
        yield refuse(x, *pair(meta), error=RuntimeError, expected=f"{name} {on}")
    words = "shift of dtype float32 like scale, got bfloat16"
    yield refuse(half, s, s.bfloat16(), error=TypeError, expected=words)
    for wrong in (x[:1], x[:, :4], x[..., :6], x[0]):
        words = f"residual of size [2, 8, 7, 7], got {list(wrong.shape)}"
        yield refuse(x, s, s, expected=words, residual=wrong)
    yield refuse(x, s, s, error=TypeError, expected="residual of dtype float32, got bfloat16", residual=half)
    yield refuse(x, s, s, error=RuntimeError, expected=f"residual {on}", residual=x.to("meta"))
    names = f"activation to be one of {', '.join(ACTIVATIONS)}, got swish"
    yield refuse(x, s, s, expected=names, activation="swish")


INFO = OpInfo(
    name="scale_shift_act",
    op=ops.scale_shift_act,
    reference=reference,
    parameters=_parameters,
    options=(
        {"activation": "relu"},
        {"activation": "none"},
        {"activation": "relu", "residual": "like x"},
        {"activation": "relu6", "residual": "channels_last"},
        {"activation": "silu", "residual": "crop"},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"activation": "hardswish", "residual": "channel_slice"},
        {"activation": "leaky_relu", "residual": "contiguous"},
        {"activation": "none", "residual": "batch_last"},
    ),
    bench=({"activation": "relu", "residual": "like x"}, {"activation": "relu"}, {"activation": "silu"}),
    bench_sizes=(  # ResNet-50, DenseNet-121 and EfficientNet-B0, batch 1 and 8, and odd ones
        ((1, 256, 56, 56), (8, 512, 28, 28), (8, 2048, 7, 7), (1, 1024, 14, 14), (3, 100, 33, 31)),
        ((1, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 7, 7), (1, 64, 112, 112), (3, 100, 33, 31)),
        ((1, 144, 56, 56), (8, 240, 28, 28), (8, 1152, 7, 7), (1, 32, 112, 112), (3, 100, 33, 31)),
    ),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 3 * s.x.numel(),
    backward_flops=lambda s: 7 * s.x.numel(),
    gpu_traffic=(1.2, 1.2),
)
