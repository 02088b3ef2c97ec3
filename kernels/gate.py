"""The activations and gates of csrc/gate.h and their gradients, with torch's values at the corners and for NaN."""

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)
GELU_TANH = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)
SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _clamp6(x):
    x = tl.where(x < 0, 0.0, x)  # a comparison keeps NaN, a minimum does not
    return tl.where(x > 6, 6.0, x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        return _clamp6(x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid((x + x * x * x * GELU_CUBE) * GELU_TANH)  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    elif ACTIVATION == "hardswish":
        return x * _clamp6(x + 3) / 6
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * LEAKY_SLOPE)
    else:
        tl.static_assert(ACTIVATION == "none")
        return x


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr):
    """The gradient of x. Where the slope is 0 an infinite ``grad`` gives 0, as in torch."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        return tl.where((x <= 0) | (x >= 6), 0.0, grad)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))
    elif ACTIVATION == "gelu":
        return grad * (0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * NORMAL * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid((x + x * x * x * GELU_CUBE) * GELU_TANH)
        return grad * (s + x * s * (1 - s) * (1 + x * x * (3 * GELU_CUBE)) * GELU_TANH)
    elif ACTIVATION == "hardswish":
        return tl.where(x <= -3, 0.0, tl.where(x < 3, grad * (x / 3 + 0.5), grad))
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, grad, grad * LEAKY_SLOPE)
    else:
        return grad


@triton.jit
def apply_gate(x, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return tl.sigmoid(x)
    else:
        tl.static_assert(GATE == "hardsigmoid")
        return _clamp6(x + 3) / 6


@triton.jit
def gate_backward(grad, x, GATE: tl.constexpr):
    """The gradient of x."""
    if GATE == "sigmoid":
        s = tl.sigmoid(x)
        return grad * (s * (1 - s))
    else:
        return tl.where((x > -3) & (x < 3), grad / 6, 0.0)
