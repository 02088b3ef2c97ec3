from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.operator import Operator


def check(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, gate: str) -> None:
    op = "channel_attention"
    checks.feature_map(op, x)
    parameters = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    for name, t in parameters.items():
        if t is None and name[0] == "w":
            raise TypeError(f"{op}: expected {name} to be a tensor, got None")
        checks.parameter(op, name, t, x)
    checks.one_dtype(op, **parameters)
    c = x.shape[1]
    r = checks.hidden_size(op, w1, c)
    checks.vector(op, "b1", b1, r)
    checks.matrix(op, "w2", w2, c, r)
    checks.vector(op, "b2", b2, c)
    checks.one_of(op, "activation", activation, tuple(ACTIVATIONS))
    checks.one_of(op, "gate", gate, tuple(GATES))
    if x.shape[2] * x.shape[3] == 0:
        words = f"at least one pixel to take the maximum of, got an input of size {list(x.shape)}"
        raise ValueError(f"{op}: expected {words}")


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    def linear(s: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(s, w.flatten(1).to(s.dtype), None if b is None else b.to(s.dtype))

    def layers(s: Tensor) -> Tensor:
        return linear(ACTIVATIONS[activation](linear(s, w1, b1)), w2, b2)

    y = GATES[gate](layers(x.mean((2, 3))) + layers(x.amax((2, 3))))
    return y[:, :, None, None].to(x.dtype)  # also under autocast


operator = Operator(
    "channel_attention",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate) -> Tensor",
    check,
    reference,
    output_size=lambda x, *args: (*x.shape[:2], 1, 1),
)


def channel_attention(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """The gates of the channels in CBAM: two layers that see the mean of each plane, and its maximum.

    ``gate(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))`` with ``mlp(s) = w2 @ act(w1 @ s + b1) + b2``; mean and maximum
    come from one read. Woo et al., "CBAM: Convolutional Block Attention Module", arXiv 1807.06521.
    ``apply_gates`` multiplies by the result; ``squeeze_excite(add_maxpool=True)`` is the light form.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        w1: (R, C) or (R, C, 1, 1).
        b1: (R,), or None.
        w2: (C, R) or (C, R, 1, 1).
        b2: (C,), or None.
        activation: "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "leaky_relu" (slope 0.01).
        gate: "sigmoid" or "hardsigmoid" (relu6(s + 3) / 6).

        All weights and biases are of one dtype: that of x, or float32 with a half-precision x.

    Returns:
        (N, C, 1, 1), of the dtype of x. Pixels that share the maximum share its gradient equally, as of ``torch.amax``.

    Raises:
        ValueError: a wrong rank or size, no pixels, or an unknown activation or gate.
        TypeError: a dtype other than the above.
        RuntimeError: a weight is on another device than x.

    Example:
        >>> x, w1, w2 = torch.randn(2, 64, 56, 56), torch.randn(4, 64), torch.randn(64, 4)
        >>> y = x * convblocks.ops.channel_attention(x, w1, None, w2, None)
    """
    return operator(x, w1, b1, w2, b2, activation, gate)
