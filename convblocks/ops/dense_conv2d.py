from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.depthwise_conv2d import MOST, Pair, convolve, pair
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.operator import Operator

NAME = "dense_conv2d"


def _numbers(name: str, values: Sequence[int], least: int) -> None:
    if len(values) != 2 or any(value < least or value > MOST for value in values):
        numbers = f"2 numbers from {least} to {MOST}"
        raise ValueError(f"{NAME}: expected {name} of {numbers}, got [{', '.join(map(str, values))}]")


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> None:
    checks.feature_map(NAME, x)
    if 0 in x.shape[2:]:
        raise ValueError(f"{NAME}: expected at least one pixel, got an input of size {list(x.shape)}")
    if weight is None:
        raise TypeError(f"{NAME}: expected weight to be a tensor, got None")
    checks.parameter(NAME, "weight", weight, x)
    c, size = x.shape[1], tuple(weight.shape)
    ok = len(size) == 4 and size[1] == c and 0 not in size
    checks.size(NAME, "weight", weight, ok, f"[o, {c}, kh, kw]")
    for name, t in (("scale", scale), ("shift", shift)):
        checks.parameter(NAME, name, t, x)
        checks.vector(NAME, name, t, size[0])
    checks.one_dtype(NAME, scale=scale, shift=shift)
    _numbers("stride", stride, 1)
    _numbers("padding", padding, 0)
    _numbers("dilation", dilation, 1)
    checks.one_of(NAME, "activation", activation, tuple(ACTIVATIONS))
    padded = [length + 2 * p for length, p in zip(x.shape[2:], padding, strict=True)]
    kernel = [d * (k - 1) + 1 for d, k in zip(dilation, size[2:], strict=True)]
    if padded[0] < kernel[0] or padded[1] < kernel[1]:
        raise ValueError(
            f"{NAME}: expected a padded input of at least {kernel[0]} x {kernel[1]}, the size of the dilated kernel, "
            f"got {padded[0]} x {padded[1]}"
        )
    if residual is not None:
        expected = output_size(x, weight, scale, shift, residual, stride, padding, dilation, activation)
        checks.like(NAME, "residual", residual, x, expected)


def output_size(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> list[int]:
    sides = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    return [x.shape[0], weight.shape[0], *sides]


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: str = "none",
) -> Tensor:
    y = convolve(x, weight, None, stride, padding, dilation)
    z = y if scale is None else y * scale[:, None, None]
    z = z if shift is None else z + shift[:, None, None]
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation](z).to(y.dtype)


def _arguments(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> tuple[Any, ...]:
    return x, weight, scale, shift, residual, pair(stride), pair(padding), pair(dilation), activation


operator = Operator(
    NAME,
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, str activation) -> Tensor",
    check,
    reference,
    output_size=output_size,
    arguments=_arguments,
)


def dense_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: str = "none",
) -> Tensor:
    """A convolution without groups and what follows it at inference: batch norm, a residual, an activation.

    ``y = act(conv2d(x, weight) * scale[o] + shift[o] + residual)``. On the CPU that is one kernel, which multiplies the
    scale into the weights while it lays them out: nothing is kept from call to call. Elsewhere, and in half precision
    or of less than 8 channels in NCHW, the convolution is torch's, and what follows it one pass. Ioffe et al., "Batch
    Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", arXiv 1502.03167.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        weight: (O, C, kh, kw); of x's dtype, or float32 with a half-precision x.
        scale, shift: (O,), of one dtype, which is as the weight's may be; None: 1 and 0. A shift alone is a bias.
        residual: a map of the result's size and of x's dtype, any strides; or None.
        stride, padding, dilation: one number, or two for height and width.
        activation: "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "leaky_relu" (slope 0.01).

        Under autocast all are cast, as for torch's convolutions.

    Returns:
        (N, O, H', W') in the memory format of x.

    Raises:
        ValueError: a wrong rank or size, a kernel larger than the padded input, or an unknown activation.
        TypeError: a dtype other than the above.
        RuntimeError: another tensor is on another device than x.

    Example:
        >>> x, weight, scale, shift = (torch.randn(s) for s in ((2, 64, 28, 28), (96, 64, 3, 3), 96, 96))
        >>> y = convblocks.ops.dense_conv2d(x, weight, scale, shift, padding=1, activation="relu")
    """
    return operator(*_arguments(x, weight, scale, shift, residual, stride, padding, dilation, activation))
