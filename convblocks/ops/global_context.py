from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from convblocks.ops import checks
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.operator import Operator

MaybeTensor = Tensor | None

_OP = "global_context"
_TRANSFORM = ("w1", "b1", "norm_weight", "norm_bias", "w2", "b2")
TRANSFORMS = ("scale", "add")
PARAMETERS = ("attn_weight", "attn_bias", *(f"{t}_{name}" for t in TRANSFORMS for name in _TRANSFORM))


def _check_transform(name: str, tensors: dict[str, MaybeTensor], c: int) -> None:
    given = {n: t for n, t in tensors.items() if t is not None}
    for n in tensors:
        if n not in given:
            raise ValueError(f"{_OP}: expected {n} with {next(iter(given))}, got None")
    w1, b1, norm_weight, norm_bias, w2, b2 = (f"{name}_{n}" for n in _TRANSFORM)
    r = checks.hidden_size(_OP, given[w1], c, w1)
    checks.vector(_OP, b1, given[b1], r)
    for n in (norm_weight, norm_bias):
        checks.size(_OP, n, given[n], list(given[n].shape) in ([r], [r, 1, 1]), f"[{r}] or [{r}, 1, 1]")
    checks.matrix(_OP, w2, given[w2], c, r)
    checks.vector(_OP, b2, given[b2], c)


def check(x: Tensor, *args: Any) -> None:
    *values, _eps, activation, gate = args
    tensors: dict[str, MaybeTensor] = dict(zip(PARAMETERS, values, strict=True))
    checks.feature_map(_OP, x)
    for name, t in tensors.items():
        checks.parameter(_OP, name, t, x)
    checks.one_dtype(_OP, **tensors)
    c = x.shape[1]
    weight, bias = tensors["attn_weight"], tensors["attn_bias"]
    if weight is not None:
        checks.matrix(_OP, "attn_weight", weight, 1, c)
    if weight is None and bias is not None:
        raise ValueError(f"{_OP}: expected attn_bias only with attn_weight, got attn_bias of size {list(bias.shape)}")
    checks.vector(_OP, "attn_bias", bias, 1)
    given = False
    for name in TRANSFORMS:
        transform = {n: t for n, t in tensors.items() if n.startswith(f"{name}_")}
        if any(t is not None for t in transform.values()):
            _check_transform(name, transform, c)
            given = True
    if not given:
        raise ValueError(f"{_OP}: expected the tensors of scale, of add or of both, got neither")
    checks.one_of(_OP, "activation", activation, tuple(ACTIVATIONS))
    checks.one_of(_OP, "gate", gate, tuple(GATES))


def _context(x: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> Tensor:
    """(N, C): the pixels weighted by the softmax of their logits, or their mean."""
    if weight is None:
        return x.mean((2, 3))
    pixels = x.flatten(2)
    logits = weight.reshape(1, 1, -1).to(x.dtype).expand(x.shape[0], -1, -1) @ pixels
    if bias is not None:  # with which the softmax does not change, so that its gradient is 0, without rounding
        logits = logits + 0 * bias.to(x.dtype)
    return (pixels @ _softmax(logits).transpose(1, 2)).squeeze(2)


def _is_dual(t: Tensor) -> bool:
    """Whether t has a forward-mode derivative. That of torch's softmax and layer_norm cannot be differentiated again:
    one refuses, the other is wrong."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(t).tangent is not None


def _softmax(logits: Tensor) -> Tensor:
    if not _is_dual(logits):
        return logits.softmax(-1)
    powers = (logits - logits.detach().logsumexp(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def _layer_norm(t: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not _is_dual(t):
        return F.layer_norm(t, t.shape[1:], weight, bias, eps)
    d = t - t.mean(1, keepdim=True)
    return d * (d.square().mean(1, keepdim=True) + eps).rsqrt() * weight + bias


def reference(
    x: Tensor,
    attn_weight: MaybeTensor,
    attn_bias: MaybeTensor,
    scale_w1: MaybeTensor,
    scale_b1: MaybeTensor,
    scale_norm_weight: MaybeTensor,
    scale_norm_bias: MaybeTensor,
    scale_w2: MaybeTensor,
    scale_b2: MaybeTensor,
    add_w1: MaybeTensor,
    add_b1: MaybeTensor,
    add_norm_weight: MaybeTensor,
    add_norm_bias: MaybeTensor,
    add_w2: MaybeTensor,
    add_b2: MaybeTensor,
    eps: float = 1e-5,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    c = _context(x, attn_weight, attn_bias)

    def transform(w1: Tensor, b1: Any, norm_weight: Any, norm_bias: Any, w2: Any, b2: Any) -> Tensor:
        hidden = F.linear(c, w1.flatten(1).to(c.dtype), b1.to(c.dtype))
        norm_weight, norm_bias = norm_weight.flatten().to(c.dtype), norm_bias.flatten().to(c.dtype)
        hidden = ACTIVATIONS[activation](_layer_norm(hidden, norm_weight, norm_bias, eps))
        return F.linear(hidden, w2.flatten(1).to(c.dtype), b2.to(c.dtype))[:, :, None, None]

    y = x
    if scale_w1 is not None:
        y = y * GATES[gate](transform(scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2))
    if add_w1 is not None:
        y = y + transform(add_w1, add_b1, add_norm_weight, add_norm_bias, add_w2, add_b2)
    return y


operator = Operator(
    _OP,
    f"(Tensor x, {', '.join(f'Tensor? {name}' for name in PARAMETERS)}, float eps, str activation, str gate) -> Tensor",
    check,
    reference,
)


def global_context(
    x: Tensor,
    attn_weight: MaybeTensor = None,
    attn_bias: MaybeTensor = None,
    scale_w1: MaybeTensor = None,
    scale_b1: MaybeTensor = None,
    scale_norm_weight: MaybeTensor = None,
    scale_norm_bias: MaybeTensor = None,
    scale_w2: MaybeTensor = None,
    scale_b2: MaybeTensor = None,
    add_w1: MaybeTensor = None,
    add_b1: MaybeTensor = None,
    add_norm_weight: MaybeTensor = None,
    add_norm_bias: MaybeTensor = None,
    add_w2: MaybeTensor = None,
    add_b2: MaybeTensor = None,
    *,
    eps: float = 1e-5,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Global context: scales and shifts every channel by what all pixels, weighted by attention, say together.

    ``y = x * gate(scale(c)) + add(c)``. The context is ``c = sum(a * x)`` over the pixels with
    ``a = softmax(attn_weight @ x + attn_bias)`` over them, or without attn_weight ``c = x.mean((2, 3))``. Each of the
    two transforms is ``w2 @ act(layer_norm(w1 @ c + b1) * norm_weight + norm_bias) + b2``. Cao et al., "GCNet:
    Non-local Networks Meet Squeeze-Excitation Networks and Beyond", arXiv 1904.11492.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        attn_weight: (1, C) or (1, C, 1, 1), or None.
        attn_bias: (1,), or None.
        scale_w1, add_w1: (R, C) or (R, C, 1, 1); all six tensors of a transform are given, or none. R may differ.
        scale_b1, add_b1: (R,).
        scale_norm_weight, scale_norm_bias, add_norm_weight, add_norm_bias: (R,) or (R, 1, 1).
        scale_w2, add_w2: (C, R) or (C, R, 1, 1).
        scale_b2, add_b2: (C,).
        eps: is added to the variance in the norms.
        activation: "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish" or "leaky_relu" (slope 0.01).
        gate: "sigmoid" or "hardsigmoid" (relu6(s + 3) / 6).

        All parameters are of one dtype: that of x, or float32 with a half-precision x.

    Returns:
        A tensor like x, in its memory format.

    Raises:
        ValueError: a wrong rank or size, neither transform, a part of one, or an unknown activation or gate.
        TypeError: a dtype other than the above.
        RuntimeError: a parameter is on another device than x.

    Example:
        >>> x, r = torch.randn(2, 64, 56, 56), torch.randn(8)
        >>> add = dict(add_w1=torch.randn(8, 64), add_b1=r, add_norm_weight=r, add_norm_bias=r)
        >>> add |= dict(add_w2=torch.randn(64, 8), add_b2=torch.randn(64))
        >>> y = convblocks.ops.global_context(x, torch.randn(1, 64), **add)
    """
    return operator(
        x,
        attn_weight,
        attn_bias,
        *(scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2),
        *(add_w1, add_b1, add_norm_weight, add_norm_bias, add_w2, add_b2),
        eps,
        activation,
        gate,
    )
