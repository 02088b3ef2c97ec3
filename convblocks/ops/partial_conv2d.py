from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.operator import Operator


def check(x: Tensor, weight: Tensor) -> None:
    op = "partial_conv2d"
    checks.feature_map(op, x)
    if weight is None:
        raise TypeError(f"{op}: expected weight to be a tensor, got None")
    checks.parameter(op, "weight", weight, x)
    c, size = x.shape[1], tuple(weight.shape)
    ok = len(size) == 4 and size[0] == size[1] and 0 < size[0] <= c and size[2] == size[3] and size[2] % 2 == 1
    if 0 in x.shape[2:]:
        raise ValueError(f"{op}: expected at least one pixel, got an input of size {list(x.shape)}")
    checks.size(op, "weight", weight, ok, f"[p, p, k, k] with p at most {c} and an odd k")


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x[:, : weight.shape[0]], weight.to(x.dtype), padding=weight.shape[2] // 2)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    y = _convolved(x, weight)
    return torch.cat((y, x[:, weight.shape[0] :].to(y.dtype)), 1)


operator = Operator(
    "partial_conv2d",
    "(Tensor x, Tensor weight) -> Tensor",
    check,
    reference,
    arguments=lambda x, weight, inplace: (x, weight),
)


def partial_conv2d(x: Tensor, weight: Tensor, *, inplace: bool = False) -> Tensor:
    """Partial convolution: a convolution of the first channels; the others are passed on as they are.

    ``y = torch.cat((F.conv2d(x[:, :p], weight, padding=k // 2), x[:, p:]), 1)``. Chen et al., "Run, Don't Walk: Chasing
    Higher FLOPS for Faster Neural Networks" (FasterNet), arXiv 2303.03667. The convolution is ``dense_conv2d``'s on
    the CPU and torch's elsewhere; the gradients of it are torch's.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        weight: (p, p, k, k) with p at most C and an odd k; of x's dtype, or float32 with a half-precision x. Under
            autocast both are cast, as for torch's convolutions.
        inplace: writes the first channels of x itself, and touches no others. For inference only.

    Returns:
        A tensor like x, in its memory format; x itself with ``inplace``.

    Raises:
        ValueError: a wrong rank or size, or ``inplace`` where a gradient is wanted or elements of x share memory.
        TypeError: a dtype other than the above.
        RuntimeError: the weight is on another device than x.

    Example:
        >>> x, weight = torch.randn(2, 64, 56, 56), torch.randn(16, 16, 3, 3)
        >>> y = convblocks.ops.partial_conv2d(x, weight)
    """
    if not inplace:
        return operator(x, weight)
    check(x, weight)
    checks.inplace("partial_conv2d", x, weight=weight)
    x[:, : weight.shape[0]].copy_(_convolved(x, weight))
    return x
