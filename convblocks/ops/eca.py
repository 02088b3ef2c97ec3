from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.gate import GATES
from convblocks.ops.operator import Operator

PADDINGS = ("zeros", "circular")


def check(x: Tensor, weight: Tensor, bias: Tensor | None, gate: str, padding: str) -> None:
    checks.feature_map("eca", x)
    checks.parameter("eca", "weight", weight, x)
    checks.parameter("eca", "bias", bias, x)
    checks.one_dtype("eca", weight=weight, bias=bias)
    odd = weight.dim() in (1, 3) and weight.numel() == weight.shape[-1] and weight.numel() % 2 == 1
    checks.size("eca", "weight", weight, odd, "[1, 1, k] or [k] with an odd k")
    checks.size("eca", "bias", bias, bias is not None and tuple(bias.shape) == (1,), "[1]")
    checks.one_of("eca", "gate", gate, tuple(GATES))
    checks.one_of("eca", "padding", padding, PADDINGS)
    c, k = x.shape[1], weight.shape[-1]
    if padding == "circular" and k // 2 > c:
        raise ValueError(f"eca: expected at least {k // 2} channels for circular padding of a {k}-tap weight, got {c}")


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gate: str = "sigmoid", padding: str = "zeros"
) -> Tensor:
    s = x.mean((2, 3)).unsqueeze(1)
    k = weight.shape[-1]
    if padding == "circular" and k > 1:
        s = torch.cat((s[..., -(k // 2) :], s, s[..., : k // 2]), -1)
    bias = None if bias is None else bias.to(s.dtype)
    s = F.conv1d(s, weight.reshape(1, 1, k).to(s.dtype), bias, padding=k // 2 if padding == "zeros" else 0)
    return x * GATES[gate](s.squeeze(1))[:, :, None, None]


operator = Operator(
    "eca",
    "(Tensor x, Tensor weight, Tensor? bias, str gate, str padding) -> Tensor",
    check,
    reference,
)


def eca(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gate: str = "sigmoid", padding: str = "zeros"
) -> Tensor:
    """Efficient channel attention: scales every channel by a gate computed from the means of its neighbours.

    ``y = x * gate(conv1d(x.mean((2, 3)), weight) + bias)``: one filter of k taps slides over the channels. Wang et al.,
    "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", arXiv 1910.03151.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        weight: (1, 1, k) or (k,), k odd; of x's dtype, or float32 with a half-precision x.
        bias: (1,) of the weight's dtype, or None (the paper has none).
        gate: "sigmoid" or "hardsigmoid" (relu6(s + 3) / 6).
        padding: "zeros", or "circular" for the channels from the other end (timm's CecaModule).

    Returns:
        A tensor like x, in its memory format.

    Raises:
        ValueError: a wrong rank or size, an even k, an unknown gate or padding, too few channels for
            circular padding.
        TypeError: a dtype other than the above.
        RuntimeError: the weight is on another device than x.

    Example:
        >>> x, weight = torch.randn(2, 64, 56, 56), torch.randn(1, 1, 3)
        >>> y = convblocks.ops.eca(x, weight)
    """
    return operator(x, weight, bias, gate, padding)
