from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.operator import Operator


def check(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gate: str,
    add_maxpool: bool,
) -> None:
    op = "squeeze_excite"
    checks.feature_map(op, x)
    if w2 is None:
        raise TypeError(f"{op}: expected w2 to be a tensor, got None")
    for name, t in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        checks.parameter(op, name, t, x)
    checks.one_dtype(op, w2=w2, w1=w1, b1=b1, b2=b2)
    c = x.shape[1]
    if w1 is None:
        if b1 is not None:
            raise ValueError(f"{op}: expected b1 only with w1, got b1 of size {list(b1.shape)}")
        r = c
    else:
        r = checks.hidden_size(op, w1, c)
    checks.vector(op, "b1", b1, r)
    checks.matrix(op, "w2", w2, c, r)
    checks.vector(op, "b2", b2, c)
    checks.one_of(op, "activation", activation, tuple(ACTIVATIONS))
    checks.one_of(op, "gate", gate, tuple(GATES))
    if add_maxpool and x.shape[2] * x.shape[3] == 0:
        raise ValueError(
            f"{op}: expected at least one pixel to take the maximum of, got an input of size {list(x.shape)}"
        )


def reference(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
    add_maxpool: bool = False,
) -> Tensor:
    def linear(s: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(s, w.flatten(1).to(s.dtype), None if b is None else b.to(s.dtype))

    s = x.mean((2, 3))
    if add_maxpool:
        s = 0.5 * s + 0.5 * x.amax((2, 3))
    if w1 is not None:
        s = ACTIVATIONS[activation](linear(s, w1, b1))
    return x * GATES[gate](linear(s, w2, b2))[:, :, None, None]


operator = Operator(
    "squeeze_excite",
    "(Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate, bool add_maxpool) -> Tensor",
    check,
    reference,
)


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    add_maxpool: bool = False,
) -> Tensor:
    """Squeeze-and-excitation: scales every channel by a gate computed from the means of all channels.

    ``y = x * gate(w2 @ act(w1 @ p + b1) + b2)`` with ``p = x.mean((2, 3))``. Hu et al., "Squeeze-and-Excitation
    Networks", arXiv 1709.01507. With ``w1=None`` there is one layer, ``y = x * gate(w2 @ p + b2)``: the effective
    squeeze-excite of CenterMask, arXiv 1911.06667.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        w1: (R, C) or (R, C, 1, 1), or None.
        b1: (R,), or None.
        w2: (C, R) or (C, R, 1, 1); (C, C) or (C, C, 1, 1) without w1.
        b2: (C,), or None.
        activation: "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "leaky_relu" (slope 0.01).
        gate: "sigmoid" or "hardsigmoid" (relu6(s + 3) / 6).
        add_maxpool: squeeze with ``0.5 * mean + 0.5 * max`` (timm). Pixels that share the maximum share its gradient.

        All weights and biases are of one dtype: that of x, or float32 with a half-precision x.

    Returns:
        A tensor like x, in its memory format.

    Raises:
        ValueError: a wrong rank or size, or an unknown activation or gate.
        TypeError: a dtype other than the above.
        RuntimeError: a weight is on another device than x.

    Example:
        >>> x, w1, w2 = torch.randn(2, 64, 56, 56), torch.randn(4, 64), torch.randn(64, 4)
        >>> y = convblocks.ops.squeeze_excite(x, w1, None, w2, None, activation="silu")
    """
    return operator(x, w1, b1, w2, b2, activation, gate, add_maxpool)
