from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.operator import Operator

MODES = ("add", "max", "mul", "concat")


def check(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    mode: str,
) -> None:
    op = "scse"
    checks.feature_map(op, x)
    if w is None:
        raise TypeError(f"{op}: expected w to be a tensor, got None")
    for name, t in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2), ("w", w), ("b", b)):
        checks.parameter(op, name, t, x)
    checks.one_dtype(op, w=w, w1=w1, b1=b1, w2=w2, b2=b2, b=b)
    c = x.shape[1]
    if w1 is not None and w2 is not None:
        r = checks.hidden_size(op, w1, c)
        checks.matrix(op, "w2", w2, c, r)
        checks.vector(op, "b1", b1, r)
        checks.vector(op, "b2", b2, c)
    else:
        for name, t, other in (("w1", w1, "w2"), ("w2", w2, "w1"), ("b1", b1, "w1"), ("b2", b2, "w2")):
            if t is not None:
                raise ValueError(f"{op}: expected {name} only with {other}, got {name} of size {list(t.shape)}")
    checks.size(op, "w", w, list(w.shape) in ([c], [1, c], [1, c, 1, 1]), f"[{c}], [1, {c}] or [1, {c}, 1, 1]")
    checks.vector(op, "b", b, 1)
    checks.one_of(op, "mode", mode, MODES)


def reference(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    mode: str = "add",
) -> Tensor:
    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    weight, bias = w.reshape(1, -1, 1, 1).to(x.dtype), cast(b)
    if x.shape[2] * x.shape[3] > 0:
        z = F.conv2d(x, weight, bias)
    else:  # which torch's convolution refuses
        z = (x * weight).sum(1, keepdim=True) + (0 if bias is None else bias)
    spatial = x * torch.sigmoid(z)
    if w1 is None or w2 is None:
        return spatial
    s = F.relu(F.linear(x.mean((2, 3)), w1.flatten(1).to(x.dtype), cast(b1)))
    channel = x * torch.sigmoid(F.linear(s, w2.flatten(1).to(x.dtype), cast(b2)))[:, :, None, None]
    if mode == "concat":
        return torch.cat((channel, spatial), 1)
    if mode == "max":
        return torch.maximum(channel, spatial)
    return channel * spatial if mode == "mul" else channel + spatial


def _output_size(x: Tensor, w1: Tensor | None, *args: object) -> list[int]:
    n, c, h, w = x.shape
    return [n, 2 * c if args[-1] == "concat" and w1 is not None else c, h, w]


operator = Operator(
    "scse",
    "(Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor w, Tensor? b, str mode) -> Tensor",
    check,
    reference,
    output_size=_output_size,
)


def scse(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    *,
    mode: str = "add",
) -> Tensor:
    """Concurrent spatial and channel squeeze-and-excitation: gates for the channels and gates for the pixels.

    ``cse = x * s`` with ``s = sigmoid(w2 @ relu(w1 @ x.mean((2, 3)) + b1) + b2)``, a number for each channel;
    ``sse = x * q`` with ``q = sigmoid(w . x + b)``, a number for each pixel; and both combined. Roy et al.,
    "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks", arXiv 1803.02579, and
    "Recalibrating Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation' Blocks", arXiv
    1808.08127. With ``w1 = b1 = w2 = b2 = None`` the result is ``sse`` alone, whatever the mode; ``cse`` alone is
    :func:`squeeze_excite`.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        w1: (R, C) or (R, C, 1, 1), or None.
        b1: (R,), or None.
        w2: (C, R) or (C, R, 1, 1), or None.
        b2: (C,), or None.
        w: (C,), (1, C) or (1, C, 1, 1).
        b: (1,), or None.
        mode: "add" ``cse + sse``; "max" the larger of the two, each with half of the gradient where they are equal, as
            ``torch.maximum`` has it; "mul" ``cse * sse``, which has x squared; "concat" cse, then sse, (N, 2 C, H, W).

        All weights and biases are of one dtype: that of x, or float32 with a half-precision x.

    Returns:
        A tensor like x, with twice the channels for "concat", in its memory format.

    Raises:
        ValueError: a wrong rank or size, an unknown mode, or a part of the channel gates without the rest.
        TypeError: a dtype other than the above, or no w.
        RuntimeError: a weight is on another device than x.

    Example:
        >>> x, w1, w2, w = torch.randn(2, 64, 56, 56), torch.randn(4, 64), torch.randn(64, 4), torch.randn(64)
        >>> y = convblocks.ops.scse(x, w1, None, w2, None, w, None, mode="max")
    """
    return operator(x, w1, b1, w2, b2, w, b, mode)
