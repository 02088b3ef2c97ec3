from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.apply_gates import operator as apply_gates
from convblocks.ops.channel_pool import operator as channel_pool
from convblocks.ops.depthwise_conv2d import operator as depthwise_conv2d
from convblocks.ops.gate import GATES


def convolve(
    planes: Tensor, weight: Tensor, bias: Tensor | None, run: Callable[..., Tensor] = depthwise_conv2d
) -> Tensor:
    """A convolution to one plane: each of the pooled planes by itself, then added up. Torch's convolutions take several
    times as long for so few channels. Half precision is for storage only."""
    wide = torch.promote_types(planes.dtype, torch.float32)
    pad = int(weight.shape[-1]) // 2  # a tensor while torch.jit traces
    y = run(planes.to(wide).contiguous(), weight.to(wide).transpose(0, 1), None, (1, 1), (pad,) * 4, (1, 1), "none")
    y = y.sum(1, keepdim=True)
    return (y if bias is None else y + bias.to(wide)).to(planes.dtype)


def spatial_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    channel: Tensor | None = None,
    gate: str = "sigmoid",
    residual: bool = False,
) -> Tensor:
    """The spatial half of CBAM: scales every pixel by a gate from the mean and the maximum over its channels.

    ``y = v * gate(conv(cat(v.mean(1), v.amax(1))))`` with ``v = x * channel``, which is never written, and x more with
    ``residual``: ``channel_pool``, a convolution of two planes, and ``apply_gates``. Woo et al., "CBAM: Convolutional
    Block Attention Module", arXiv 1807.06521.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        weight: (1, 2, k, k) with an odd k, for the means and then the maxima. Batch norm at inference folds into it.
        bias: (1,), or None.
        channel: gates of the channels, (N, C, 1, 1), as ``channel_attention`` gives them; or None.
        gate: "sigmoid" or "hardsigmoid" (relu6(s + 3) / 6).
        residual: adds x.

        Weight, bias and channel are of the dtype of x, or all of float32 with a half-precision x.

    Returns:
        A tensor like x, in its memory format.

    Raises:
        ValueError: a wrong rank or size, an even kernel, or an unknown gate.
        TypeError: a dtype other than the above.
        RuntimeError: a weight or gate is on another device than x.

    Example:
        >>> x, weight = torch.randn(2, 64, 56, 56), torch.randn(1, 2, 7, 7)
        >>> y = convblocks.ops.spatial_attention(x, weight)
    """
    op = "spatial_attention"
    checks.feature_map(op, x)
    checks.parameter(op, "weight", weight, x)
    checks.parameter(op, "bias", bias, x)
    size = tuple(weight.shape)
    ok = len(size) == 4 and size[:2] == (1, 2) and size[2] == size[3] and size[3] % 2 == 1
    checks.size(op, "weight", weight, ok, "[1, 2, k, k] with an odd k")
    checks.vector(op, "bias", bias, 1)
    checks.one_of(op, "gate", gate, tuple(GATES))
    pixels = GATES[gate](convolve(channel_pool(x, channel), weight, bias))
    return apply_gates(x, channel, pixels if channel is None else pixels.to(channel.dtype), residual)
