from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.depthwise_conv2d import reference
from convblocks.ops.gate import ACTIVATIONS


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    kh, kw = o["kernel"] if isinstance(o["kernel"], tuple) else (o["kernel"], o["kernel"])
    channels = size[1] * o.get("multiplier", 1)
    weight = random(channels, 1, kh, kw, scale=0.5 / (kh * kw))  # small enough for sums of the largest halves
    bias = random(channels, scale=0.5) if o.get("bias", True) else None
    kwargs: Options = {name: o[name] for name in ("stride", "padding", "dilation", "activation") if name in o}
    return (weight, bias), kwargs


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "depthwise_conv2d"
    x, w, b = (torch.zeros(s, device=device) for s in ((2, 8, 7, 7), (16, 1, 3, 5), (16,)))
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, w), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    yield refuse(x, None, error=TypeError, expected="weight to be a tensor, got None")
    for wrong in (w[:12], w[:0], w[:, :0], w[..., :0], w[0], w.expand(16, 2, 3, 5)):
        yield refuse(x, wrong, expected=f"weight of size [8 * m, 1, kh, kw], got {list(wrong.shape)}")
    yield refuse(x[:, :0], w, expected="weight of size [0 * m, 1, kh, kw], got [16, 1, 3, 5]")
    yield refuse(x, w, b[:8], expected="bias of size [16], got [8]")
    yield refuse(x, w.double(), error=TypeError, expected="weight of dtype float32, got float64")
    yield refuse(x, w, b.double(), error=TypeError, expected="bias of dtype float32, got float64")
    yield refuse(x, w.to("meta"), error=RuntimeError, expected=f"weight on {x.device} like the input, got meta")
    for stride in (0, -1):
        words = f"stride of 2 numbers from 1 to 2147483647, got [{stride}, {stride}]"
        yield refuse(x, w, expected=words, stride=stride)
        yield refuse(x, w, expected=words, stride=stride, padding="same")
    yield refuse(x, w, expected="dilation of 2 numbers from 1 to 2147483647, got [1, 0]", dilation=(1, 0))
    yield refuse(x, w, expected="padding of 4 numbers from 0 to 2147483647, got [-1, -1, 0, 0]", padding=(0, -1))
    yield refuse(x, w, expected="padding of 4 numbers from 0 to 2147483647, got [1, 1, 1]", padding=(1, 1, 1))
    large = 2**31
    yield refuse(x, w, expected=f"dilation of 2 numbers from 1 to 2147483647, got [1, {large}]", dilation=(1, large))
    for padding in ("full", None):
        yield refuse(x, w, expected=f"padding to be numbers, same or valid, got {padding}", padding=padding)
    names = f"activation to be one of {', '.join(ACTIVATIONS)}, got swish"
    yield refuse(x, w, expected=names, activation="swish")
    words = "a padded input of at least 9 x 9, the size of the dilated kernel, got 7 x 9"
    yield refuse(x, w, expected=words, padding=(0, 1), dilation=(4, 2))


def _macs(sample: Sample) -> int:
    taps: int = sample.args[1][0].numel()
    return INFO.output(sample).numel() * taps


INFO = OpInfo(
    name="depthwise_conv2d",
    op=ops.depthwise_conv2d,
    reference=reference,
    parameters=_parameters,
    options=(
        {"kernel": 3, "padding": 1, "activation": "relu6"},
        {"kernel": 3, "padding": "same", "stride": 2, "bias": False},
        {"kernel": 5, "padding": 2, "activation": "silu"},
        {"kernel": 5, "padding": 2, "stride": 2, "activation": "hardswish"},
        {"kernel": 7, "padding": 3, "bias": False},
        # With stride 1 torch's own gradient of a dilated bfloat16 filter reads memory that is not its own.
        {"kernel": 3, "padding": 2, "stride": 2, "dilation": 2, "multiplier": 2, "activation": "relu"},
        {"kernel": (1, 3), "padding": (3, 1, 0, 2), "stride": (1, 3), "activation": "gelu"},
        {"kernel": (4, 2), "padding": (2, 1), "stride": (3, 2), "dilation": (1, 2), "multiplier": 3},
        {"kernel": (9, 1), "padding": (4, 0), "activation": "leaky_relu"},
        {"kernel": (3, 13), "padding": (1, 6), "activation": "gelu_tanh"},
    ),
    bench=(
        {"kernel": 3, "padding": 1, "activation": "relu6"},
        {"kernel": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel": 5, "padding": 2, "activation": "silu"},
        {"kernel": 5, "padding": 2, "stride": 2, "bias": False},
        {"kernel": 7, "padding": 3},
    ),
    bench_sizes=(  # MobileNet V2, V3, EfficientNet-B0 and ConvNeXt-T, batch 1 and 8, and odd ones
        ((1, 144, 56, 56), (8, 384, 14, 14), (1, 32, 112, 112), (8, 144, 56, 56), (1, 960, 7, 7), (2, 100, 33, 33)),
        ((8, 144, 56, 56), (1, 96, 112, 112), (8, 576, 14, 14), (8, 96, 112, 112), (3, 100, 33, 31)),
        ((1, 240, 28, 28), (8, 672, 14, 14), (8, 1152, 7, 7), (8, 240, 28, 28), (3, 100, 33, 31)),
        ((8, 144, 56, 56), (1, 72, 56, 56), (8, 672, 14, 14), (1, 672, 14, 14), (3, 100, 33, 31)),
        ((8, 384, 14, 14), (1, 96, 56, 56), (8, 768, 7, 7), (8, 96, 56, 56), (3, 100, 33, 31)),
    ),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * _macs(s),
    backward_flops=lambda s: 4 * _macs(s),
    gpu_traffic=(1.25, 1.5),
    autocasts=True,
)
