from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.operator import Operator

Pair = int | Sequence[int]
Padding = str | Pair
MOST = 2**31 - 1  # so that no size overflows


def _numbers(name: str, values: Sequence[int], count: int, least: int) -> None:
    if len(values) != count or any(value < least or value > MOST for value in values):
        numbers = f"{count} numbers from {least} to {MOST}"
        raise ValueError(f"depthwise_conv2d: expected {name} of {numbers}, got [{', '.join(map(str, values))}]")


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> None:
    op = "depthwise_conv2d"
    checks.feature_map(op, x)
    if weight is None:
        raise TypeError(f"{op}: expected weight to be a tensor, got None")
    checks.parameter(op, "weight", weight, x)
    checks.parameter(op, "bias", bias, x)
    checks.one_dtype(op, weight=weight, bias=bias)
    c, size = x.shape[1], tuple(weight.shape)
    ok = len(size) == 4 and size[1] == 1 and 0 not in (c, *size) and size[0] % c == 0
    checks.size(op, "weight", weight, ok, f"[{c} * m, 1, kh, kw]")
    checks.size(op, "bias", bias, bias is not None and tuple(bias.shape) == size[:1], f"[{size[0]}]")
    _numbers("stride", stride, 2, 1)
    _numbers("padding", padding, 4, 0)
    _numbers("dilation", dilation, 2, 1)
    checks.one_of(op, "activation", activation, tuple(ACTIVATIONS))
    padded = x.shape[2] + padding[2] + padding[3], x.shape[3] + padding[0] + padding[1]
    kernel = [d * (k - 1) + 1 for d, k in zip(dilation, size[2:], strict=True)]
    if padded[0] < kernel[0] or padded[1] < kernel[1]:
        raise ValueError(
            f"{op}: expected a padded input of at least {kernel[0]} x {kernel[1]}, the size of the dilated kernel, got "
            f"{padded[0]} x {padded[1]}"
        )


def output_size(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> list[int]:
    pads = padding[2] + padding[3], padding[0] + padding[1]
    sides = [
        (length + pad - d * (k - 1) - 1) // s + 1
        for length, pad, d, k, s in zip(x.shape[2:], pads, dilation, weight.shape[2:], stride, strict=True)
    ]
    return [x.shape[0], weight.shape[0], *sides]


def pair(value: Pair) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def four(padding: Padding, x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Sequence[int]:
    """Left, right, top and bottom."""
    if isinstance(padding, (int, Sequence)) and not isinstance(padding, str):
        sides = pair(padding)
        return (sides[1], sides[1], sides[0], sides[0]) if len(sides) == 2 else sides
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding != "same":
        raise ValueError(f"depthwise_conv2d: expected padding to be numbers, same or valid, got {padding}")
    four: list[int] = []
    if isinstance(weight, Tensor) and weight.dim() == x.dim() == 4 and len(stride) == len(dilation) == 2:
        for i in (1, 0):
            length, s, reach = x.shape[2 + i], stride[i], dilation[i] * (weight.shape[2 + i] - 1) + 1
            total = max(0, (-(-length // s) - 1) * s + reach - length) if s > 0 else 0
            four += [total // 2, total - total // 2]
    return four or (0, 0, 0, 0)  # what is wrong otherwise, the check says


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    activation: str,
    sums: bool = False,  # says which of the operators
) -> tuple[Any, ...]:
    stride, dilation = pair(stride), pair(dilation)
    return x, weight, bias, stride, four(padding, x, weight, stride, dilation), dilation, activation


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
) -> Tensor:
    """torch's, with parameters of any dtype."""
    stride, dtype = tuple(pair(stride)), x.dtype
    # torch 2.14's gradient of a bfloat16 weight reads beyond so narrow a map, where AVX-512 has one; autocast leaves
    # float64 as it is.
    wide = x.device.type == "cpu" and dtype.itemsize == 2 and x.shape[3] < stride[1]
    x = x.double() if wide else x
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, stride, tuple(pair(padding)), tuple(pair(dilation)), groups)
    return y.to(dtype) if wide else y


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    activation: str = "none",
) -> Tensor:
    stride, dilation = pair(stride), pair(dilation)
    left, right, top, bottom = four(padding, x, weight, stride, dilation)
    if left != right or top != bottom or x.numel() == 0:  # torch pads alike on both sides, and nothing not at all
        x, left, top = F.pad(x, (left, right, top, bottom)), 0, 0
    y = convolve(x, weight, bias, stride, (top, left), dilation, x.shape[1])
    return ACTIVATIONS[activation](y)


def _reference_with_sums(*args: Any) -> tuple[Tensor, Tensor]:
    y = reference(*args)
    return y, y.sum((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))


_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, str activation"
)
operator = Operator(
    "depthwise_conv2d",
    f"({_INPUTS}) -> Tensor",
    check,
    reference,
    output_size=output_size,
    arguments=_arguments,
)
operator_with_sums = Operator(
    "depthwise_conv2d_sums",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    check,
    _reference_with_sums,
    output_size=output_size,
    arguments=_arguments,
    variant_of="depthwise_conv2d",
)


@overload
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    stride: Pair = ...,
    padding: Padding = ...,
    dilation: Pair = ...,
    activation: str = ...,
    sums: Literal[False] = ...,
) -> Tensor: ...


@overload
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    stride: Pair = ...,
    padding: Padding = ...,
    dilation: Pair = ...,
    activation: str = ...,
    sums: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    activation: str = "none",
    sums: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution: each channel with filters of its own, then bias and activation, in one pass.

    ``y = act(torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups=C))``, with any kernel size
    and any padding. Howard et al., "MobileNets", arXiv 1704.04861.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        weight: (C * m, 1, kh, kw); channel ``c`` of x gives the channels ``c * m`` to ``c * m + m - 1`` of the result.
        bias: (C * m,), or None.
        stride: one number, or two for height and width.
        padding: zeros around x: one number, two for height and width, or four as ``torch.nn.functional.pad`` has:
            left, right, top, bottom. "same" pads as TensorFlow does, to a result of size ceil(H / stride): with what
            is odd to the right and the bottom; "valid" does not pad.
        dilation: one number, or two for height and width.
        activation: "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "leaky_relu" (slope 0.01).
        sums: also returns the sum of each plane of the result, taken while it is computed: what a
            squeeze-and-excitation behind it asks for, without another pass.

        Weight and bias are of one dtype: that of x, or float32 with a half-precision x. Under autocast all are cast, as
        for torch's convolutions.

    Returns:
        (N, C * m, H', W') in the memory format of x; with ``sums`` a pair, of it and of its sums:
        (N, C * m), float32, or float64 of a float64 x.

    Raises:
        ValueError: a wrong rank or size, a kernel larger than the padded input, or an unknown activation or padding.
        TypeError: a dtype other than the above.
        RuntimeError: weight or bias is on another device than x.

    Example:
        >>> x, weight = torch.randn(2, 32, 56, 56), torch.randn(32, 1, 3, 3)
        >>> y = convblocks.ops.depthwise_conv2d(x, weight, stride=2, padding=1, activation="relu6")
    """
    arguments = _arguments(x, weight, bias, stride, padding, dilation, activation)
    if not sums:
        return operator(*arguments)
    outputs: Any = operator_with_sums(*arguments)
    y, total = outputs
    return y, total
