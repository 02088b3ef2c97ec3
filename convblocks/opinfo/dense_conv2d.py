from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Sample, Size, bad_maps
from convblocks.ops.dense_conv2d import output_size, reference
from convblocks.ops.depthwise_conv2d import pair
from convblocks.ops.gate import ACTIVATIONS


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    kh, kw = o["kernel"] if isinstance(o["kernel"], tuple) else (o["kernel"], o["kernel"])
    c, out = size[1], o.get("out") or max(1, round(size[1] * o.get("factor", 1)))
    weight = random(out, c, kh, kw, scale=0.5 / (c * kh * kw))  # small enough for sums of the largest halves
    scale = random(out, scale=0.4) if o.get("scale", True) else None
    shift = random(out) if o.get("shift", True) else None
    kwargs: Options = {name: o[name] for name in ("stride", "padding", "dilation", "activation") if name in o}
    if "residual" in o:
        stride, padding, dilation = (
            pair(o.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        x = torch.empty(size, device="meta")
        kwargs["residual"] = random(*output_size(x, weight, scale, shift, None, stride, padding, dilation, "none"))
    return (weight, scale, shift), kwargs


def _bad_inputs(device: str) -> Iterator[BadInput]:
    op = "dense_conv2d"
    x, w, s = (torch.zeros(size, device=device) for size in ((2, 8, 7, 7), (12, 8, 3, 5), (12,)))
    for bad, error, words in bad_maps(op, x):
        yield BadInput((bad, w), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    yield refuse(x, None, error=TypeError, expected="weight to be a tensor, got None")
    for wrong in (w[:0], w[:, :7], w[:, :, :0], w[0], w[None]):
        yield refuse(x, wrong, expected=f"weight of size [o, 8, kh, kw], got {list(wrong.shape)}")
    yield refuse(x[..., :0], w, expected="at least one pixel, got an input of size [2, 8, 7, 0]")
    on, single = f"on {x.device} like the input, got meta", "float32, got float64"
    yield refuse(x, w.double(), error=TypeError, expected=f"weight of dtype {single}")
    yield refuse(x, w.to("meta"), error=RuntimeError, expected=f"weight {on}")
    for name, placed in (("scale", lambda t: (t, s)), ("shift", lambda t: (s, t))):
        for wrong in (s[:7], s[None], s[0], s[:, None, None]):
            yield refuse(x, w, *placed(wrong), expected=f"{name} of size [12], got {list(wrong.shape)}")
        yield refuse(x, w, *placed(s.double()), error=TypeError, expected=f"{name} of dtype {single}")
        yield refuse(x, w, *placed(s.to("meta")), error=RuntimeError, expected=f"{name} {on}")
    half = x.bfloat16(), w.bfloat16()
    words = "shift of dtype float32 like scale, got bfloat16"
    yield refuse(*half, s, s.bfloat16(), error=TypeError, expected=words)
    for stride in (0, -1):
        words = f"stride of 2 numbers from 1 to 2147483647, got [{stride}, {stride}]"
        yield refuse(x, w, expected=words, stride=stride)
    yield refuse(x, w, expected="dilation of 2 numbers from 1 to 2147483647, got [1, 0]", dilation=(1, 0))
    yield refuse(x, w, expected="padding of 2 numbers from 0 to 2147483647, got [0, -1]", padding=(0, -1))
    yield refuse(x, w, expected="padding of 2 numbers from 0 to 2147483647, got [1, 1, 1]", padding=(1, 1, 1))
    names = f"activation to be one of {', '.join(ACTIVATIONS)}, got swish"
    yield refuse(x, w, expected=names, activation="swish")
    words = "a padded input of at least 9 x 9, the size of the dilated kernel, got 9 x 7"
    yield refuse(x, w, expected=words, padding=(1, 0), dilation=(4, 2))
    residual = torch.zeros(2, 12, 5, 3, device=device)
    for wrong in (residual[:1], residual[:, :8], x, residual[0]):
        yield refuse(x, w, expected=f"residual of size [2, 12, 5, 3], got {list(wrong.shape)}", residual=wrong)
    words = "residual of dtype float32, got bfloat16"
    yield refuse(x, w, error=TypeError, expected=words, residual=residual.bfloat16())
    yield refuse(x, w, error=RuntimeError, expected=f"residual {on}", residual=residual.to("meta"))


def _macs(sample: Sample) -> int:
    taps: int = sample.args[1][0].numel()
    return INFO.output(sample).numel() * taps


INFO = OpInfo(
    name="dense_conv2d",
    op=ops.dense_conv2d,
    reference=reference,
    parameters=_parameters,
    options=(
        {"kernel": 3, "padding": 1, "activation": "relu"},
        {"kernel": 1, "factor": 4, "activation": "silu", "residual": "like x"},
        {"kernel": 3, "padding": 1, "stride": 2, "out": 17, "activation": "relu6", "scale": False},
        {"kernel": (1, 5), "padding": (0, 2), "scale": False, "shift": False, "residual": "contiguous"},
        {"kernel": (3, 1), "padding": (2, 0), "stride": (2, 1), "dilation": (2, 1), "shift": False},
        {"kernel": 1, "out": 40, "stride": 2, "activation": "gelu"},
    ),
    bench=(
        {"kernel": 1, "factor": 4, "activation": "relu", "residual": "like x"},
        {"kernel": 1, "factor": 0.25, "activation": "relu"},
        {"kernel": 3, "padding": 1, "activation": "relu"},
    ),
    bench_sizes=(  # ResNet-50, MobileNet and EfficientNet, batch 1 and 8, and an odd one
        ((1, 64, 56, 56), (8, 128, 28, 28), (1, 512, 7, 7), (1, 24, 56, 56), (3, 60, 33, 31)),
        ((1, 256, 56, 56), (8, 512, 28, 28), (1, 2048, 7, 7), (1, 96, 56, 56), (3, 100, 33, 31)),
        ((1, 64, 56, 56), (8, 128, 28, 28), (1, 512, 7, 7), (1, 256, 14, 14), (3, 60, 33, 31)),
    ),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 2 * _macs(s),
    backward_flops=lambda s: 4 * _macs(s),
    gpu_traffic=(1.4, 1.5),  # of what is around the convolution
    autocasts=True,
    by_torch="the convolution: on GPUs, in half precision, of less than 8 channels in NCHW; that of its gradients",
)
