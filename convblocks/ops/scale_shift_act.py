from __future__ import annotations

from typing import Any

from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.operator import Operator


def check(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> None:
    op = "scale_shift_act"
    checks.feature_map(op, x)
    for name, t in (("scale", scale), ("shift", shift)):
        if t is None:
            raise TypeError(f"{op}: expected {name} to be a tensor, got None")
        checks.parameter(op, name, t, x)
        checks.size(op, name, t, list(t.shape) == [x.shape[1]], f"[{x.shape[1]}]")
    checks.one_dtype(op, scale=scale, shift=shift)
    checks.like(op, "residual", residual, x, x.shape)
    checks.one_of(op, "activation", activation, tuple(ACTIVATIONS))


def reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    z = x * scale[:, None, None] + shift[:, None, None]
    return ACTIVATIONS[activation](z if residual is None else z + residual).to(x.dtype)


def _arguments(
    x: Tensor, scale: Tensor, shift: Tensor, activation: str, residual: Tensor | None, inplace: bool
) -> tuple[Any, ...]:
    return x, scale, shift, residual, activation


operator = Operator(
    "scale_shift_act",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation) -> Tensor",
    check,
    reference,
    arguments=_arguments,
    inplace=True,
)


def scale_shift_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Scales and shifts each channel, adds a residual and applies an activation, in one pass over memory.

    ``y = act(x * scale[c] + shift[c] + residual)``. That is batch norm at inference, with what follows it in residual
    networks: ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale``. Ioffe et al., "Batch
    Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", arXiv 1502.03167.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (computed in float32, or float64), any strides.
        scale: (C,).
        shift: (C,).
        activation: "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "leaky_relu" (slope 0.01).
        residual: a map of x's size and dtype, any strides; or None.
        inplace: writes over x. For inference only. The residual may be x itself; one in another place of its memory is
            copied first.

        Scale and shift are of one dtype: that of x, or float32 with a half-precision x.

    Returns:
        A tensor like x, in its memory format; x itself with ``inplace``.

    Raises:
        ValueError: a wrong rank or size, an unknown activation, or ``inplace`` where a gradient is wanted or elements
            of x share memory.
        TypeError: a dtype other than the above.
        RuntimeError: another tensor is on another device than x.

    Example:
        >>> x, scale, shift = torch.randn(2, 64, 56, 56), torch.rand(64), torch.randn(64)
        >>> y = convblocks.ops.scale_shift_act(x, scale, shift, activation="relu", residual=torch.randn_like(x))
    """
    if not inplace:
        return operator(x, scale, shift, residual, activation)
    checks.inplace("scale_shift_act", x, scale=scale, shift=shift, residual=residual)
    return operator.run_inplace(x, scale, shift, residual, activation)
