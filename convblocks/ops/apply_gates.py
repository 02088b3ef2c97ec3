from __future__ import annotations

from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.operator import Operator


def check(x: Tensor, channel: Tensor | None, spatial: Tensor | None, residual: bool) -> None:
    op = "apply_gates"
    checks.feature_map(op, x)
    if channel is None and spatial is None:
        raise TypeError(f"{op}: expected channel or spatial to be a tensor, got None for both")
    n, c, h, w = x.shape
    for name, gate, size in (("channel", channel, [n, c, 1, 1]), ("spatial", spatial, [n, 1, h, w])):
        checks.sized(op, name, gate, x, size)
    checks.one_dtype(op, channel=channel, spatial=spatial)


def reference(
    x: Tensor, channel: Tensor | None = None, spatial: Tensor | None = None, residual: bool = False
) -> Tensor:
    y = x
    for gate in (channel, spatial):
        if gate is not None:
            y = y * gate.to(x.dtype)
    return y + x if residual else y


operator = Operator(
    "apply_gates",
    "(Tensor x, Tensor? channel, Tensor? spatial, bool residual) -> Tensor",
    check,
    reference,
)


def apply_gates(
    x: Tensor, channel: Tensor | None = None, spatial: Tensor | None = None, *, residual: bool = False
) -> Tensor:
    """Scales a map by a gate of each channel and a gate of each pixel, in one pass over memory.

    ``y = x * channel * spatial``, and x more with ``residual``: what ends the convolutional block attention module. Woo
    et al., "CBAM", arXiv 1807.06521. Backward reads x and the gradient once and writes once.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        channel: (N, C, 1, 1), or None.
        spatial: (N, 1, H, W), or None; not both.
        residual: adds x.

        The gates are of one dtype: that of x, or float32 with a half-precision x.

    Returns:
        A tensor like x, in its memory format.

    Raises:
        ValueError: a wrong rank or size.
        TypeError: a dtype other than the above, or no gate.
        RuntimeError: a gate is on another device than x.

    Example:
        >>> x, channel, spatial = torch.randn(2, 64, 56, 56), torch.rand(2, 64, 1, 1), torch.rand(2, 1, 56, 56)
        >>> y = convblocks.ops.apply_gates(x, channel, spatial)
    """
    return operator(x, channel, spatial, residual)
