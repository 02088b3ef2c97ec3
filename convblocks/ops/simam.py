from __future__ import annotations

import torch
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.operator import Operator


def check(x: Tensor, e_lambda: float) -> None:
    checks.feature_map("simam", x)
    if not e_lambda > 0:
        raise ValueError(f"simam: expected e_lambda > 0, got {e_lambda:g}")


def reference(x: Tensor, e_lambda: float = 1e-4) -> Tensor:
    n = x.shape[2] * x.shape[3] - 1
    d = (x - x.mean((2, 3), keepdim=True)).square()
    v = d.sum((2, 3), keepdim=True) / n
    return x * torch.sigmoid(d / (4 * (v + e_lambda)) + 0.5)


operator = Operator("simam", "(Tensor x, float e_lambda) -> Tensor", check, reference)


def simam(x: Tensor, e_lambda: float = 1e-4) -> Tensor:
    """SimAM: weighs every pixel by how much it stands out in its own plane, without parameters.

    ``y = x * sigmoid(d**2 / (4 * (v + e_lambda)) + 0.5)`` with ``d = x - mean`` and ``v = sum(d**2) / (H*W - 1)`` over
    each plane. Yang et al., "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
    ICML 2021 (proceedings.mlr.press/v139/yang21o).

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        e_lambda: the regulariser lambda, > 0. The published ImageNet networks were trained with 0.1.

    Returns:
        A tensor like x, in its memory format. A plane of one pixel has no variance: the result is NaN, as in the
        authors' code.

    Raises:
        ValueError: x is not 4-D, or e_lambda is not positive.
        TypeError: x is not of a floating-point dtype.

    Example:
        >>> x = torch.randn(2, 64, 56, 56)
        >>> y = convblocks.ops.simam(x, e_lambda=1e-4)
    """
    return operator(x, e_lambda)
