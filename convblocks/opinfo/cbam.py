"""The whole block of attention, as its module runs it: timed as one operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks.blocks.cbam import CBAM
from convblocks.opinfo.record import BadInput, OpInfo, Options, Size
from convblocks.ops.channel_attention import reference as channel_gates


@functools.cache
def _block(c: int, r: int, kernel: int, bias: bool) -> CBAM:
    options: Any = {"kernel_size": kernel, "mlp_bias": False, "spatial_bn": False, "spatial_bias": bias}
    return CBAM(c, rd_channels=r, **options, device="meta").eval()


def cbam(x: Tensor, w1: Tensor, w2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The block with these weights."""
    block = _block(w2.shape[0], w1.shape[0], weight.shape[-1], bias is not None)
    layers: list[tuple[Any, Tensor | None, Tensor | None]] = [
        (block.channel.fc1, w1, None),
        (block.channel.fc2, w2, None),
        (block.spatial.conv, weight, bias),
    ]
    for layer, *parameters in layers:
        layer._parameters.update(zip(("weight", "bias"), parameters, strict=True))  # which need not be leaves
    y: Tensor = block(x)
    return y


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
