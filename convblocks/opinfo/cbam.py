"""The whole block of attention, of several operations: timed as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks import ops
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size
from convblocks.ops.channel_attention import reference as channel_gates


def cbam(x: Tensor, w1: Tensor, w2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.spatial_attention(x, weight, bias, channel=ops.channel_attention(x, w1, None, w2, None))


def reference(x: Tensor, w1: Tensor, w2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    v = x * channel_gates(x, w1, None, w2, None)
    planes = torch.cat((v.mean(1, keepdim=True), v.amax(1, keepdim=True)), 1)
    bias = None if bias is None else bias.to(x.dtype)
    return v * torch.sigmoid(F.conv2d(planes, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2))


def _parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    c, k = size[1], o["kernel"]
    r = max(1, c // o.get("reduction", 4))
    weight, bias = random(1, 2, k, k, scale=1 / k), random(1) if o.get("bias") else None
    return (random(r, c, 1, 1, scale=c**-0.5), random(c, r, 1, 1, scale=r**-0.5), weight, bias), {}


def _bad_inputs(device: str) -> Iterator[BadInput]:
    yield from ()  # those of its operations


INFO = OpInfo(
    name="cbam",
    op=cbam,
    reference=reference,
    parameters=_parameters,
    options=({"kernel": 7}, {"kernel": 3, "bias": True}),
    bench=({"kernel": 7, "bias": True, "reduction": 16},),
    bad_inputs=_bad_inputs,
    forward_flops=lambda s: 7 * s.x.numel(),
    backward_flops=lambda s: 17 * s.x.numel(),
    gpu_traffic=(2.5, 5.0),
    parts=("channel_attention", "channel_pool", "depthwise_conv2d", "apply_gates"),
)
