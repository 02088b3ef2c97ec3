from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name, ignore, positive
from convblocks.blocks.layers import fusible
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.squeeze_excite import operator


def fused_forward(fc1: str, fc2: str, run: Callable[..., Tensor] = operator) -> Callable[[Any, Tensor], Tensor]:
    """A forward that runs the layers called ``fc1`` and ``fc2`` as one operation.

    Where one has become something else (``fusible``), ``self.unfused`` computes what the layers would.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = self._modules
        a, b = layers[fc1], layers[fc2]
        if self.has_norm or not fusible(x, nn.Conv2d, a, b):
            return self.unfused(x)  # type: ignore[no-any-return]
        p, q = a._parameters, b._parameters
        w1, b1, w2, b2 = p["weight"], p["bias"], q["weight"], q["bias"]
        return run(x, w1, b1, w2, b2, self.activation_name, self.gate_name, self.add_maxpool)

    return forward


def fused_one_layer_forward(fc: str, run: Callable[..., Tensor] = operator) -> Callable[[Any, Tensor], Tensor]:
    """As ``fused_forward``, with one layer and no activation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layer = self._modules[fc]
        if not fusible(x, nn.Conv2d, layer):
            return self.unfused(x)  # type: ignore[no-any-return]
        p = layer._parameters
        return run(x, None, None, p["weight"], p["bias"], "relu", self.gate_name, self.add_maxpool)

    return forward


def _squeeze(x: Tensor, add_maxpool: bool) -> Tensor:
    s = x.mean((2, 3), keepdim=True)
    return 0.5 * s + 0.5 * x.amax((2, 3), keepdim=True) if add_maxpool else s


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scales every channel by a gate computed from the means of all channels.

    ``y = x * gate(fc2(act(fc1(x.mean((2, 3))))))``, one operation (``convblocks.ops.squeeze_excite``). Hu et al.,
    "Squeeze-and-Excitation Networks", arXiv 1709.01507.

    The keywords are those of timm's ``attn_layer`` / ``se_layer`` and of torchvision's ``se_layer``; the keys of the
    state dict (``fc1``, ``bn``, ``fc2``) are those of ``timm.layers.SEModule`` and of torchvision.
    ``convert_state_dict`` reads the other layouts.

    Args:
        channels: channels C of the input; ``input_channels`` is the same.
        squeeze_channels: width R of the hidden layer; ``rd_channels`` is the same.
        rd_ratio, rd_divisor: without the width, it is C * rd_ratio rounded to a multiple of rd_divisor, at least one.
        rd_round_fn: rounds C * rd_ratio in another way.
        bias: whether the two layers have one.
        act_layer: a name, a module, or a class or partial that makes one; relu, relu6, silu, gelu, gelu_tanh, hardswish
            or leaky_relu (slope 0.01). ``activation`` is the same, ``force_act_layer`` goes before both.
        gate_layer: likewise sigmoid or hardsigmoid; ``scale_activation`` is the same.
        norm_layer: makes a norm of the hidden layer (timm's rexnet). Such a block is not one operation: torch runs it.
        add_maxpool: squeeze with ``0.5 * mean + 0.5 * max``.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels that are no positive integer, an unknown activation or gate.
        TypeError: no channels, an unknown keyword.

    Example:
        >>> y = convblocks.SqueezeExcite(64, rd_ratio=1 / 4, act_layer="silu")(torch.randn(2, 64, 56, 56))
        >>> model = timm.create_model("resnet50", block_args=dict(attn_layer=convblocks.SqueezeExcite))
    """

    def __init__(
        self,
        channels: int | None = None,
        squeeze_channels: int | None = None,
        *,
        input_channels: int | None = None,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        rd_round_fn: Callable[[float], int] | None = None,
        bias: bool = True,
        add_maxpool: bool = False,
        act_layer: Layer | None = None,
        activation: Layer | None = None,
        force_act_layer: Layer | None = None,
        gate_layer: Layer | None = None,
        scale_activation: Layer | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = positive("SqueezeExcite", "channels", input_channels if channels is None else channels)
        r = rd_channels if squeeze_channels is None else squeeze_channels
        if r is None:
            width = c * rd_ratio
            r = rd_round_fn(width) if rd_round_fn else max(1, int(width / rd_divisor + 0.5)) * rd_divisor
        r = positive("SqueezeExcite", "squeeze_channels", r)
        act = force_act_layer or activation or act_layer or "relu"
        gate = scale_activation or gate_layer or "sigmoid"
        self.activation_name = function_name("SqueezeExcite", "act_layer", act, ACTIVATIONS)
        self.gate_name = function_name("SqueezeExcite", "gate_layer", gate, GATES)
        self.add_maxpool = add_maxpool
        self.has_norm = norm_layer is not None
        self.fc1 = nn.Conv2d(c, r, 1, bias=bias, device=device, dtype=dtype)
        if norm_layer is not None:
            self.bn = norm_layer(r, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(r, c, 1, bias=bias, device=device, dtype=dtype)

    forward = fused_forward("fc1", "fc2")

    def unfused(self, x: Tensor) -> Tensor:
        s = self.fc1(_squeeze(x, self.add_maxpool))
        s = ACTIVATIONS[self.activation_name](self.bn(s) if self.has_norm else s)
        return x * GATES[self.gate_name](self.fc2(s))

    def extra_repr(self) -> str:
        maxpool = ", add_maxpool=True" if self.add_maxpool else ""
        return f"activation={self.activation_name}, gate={self.gate_name}{maxpool}"


class EffectiveSqueezeExcite(nn.Module):
    """Effective squeeze-and-excitation: one layer from the means of all channels to the gates, without reduction.

    ``y = x * gate(fc(x.mean((2, 3))))``, one operation (``convblocks.ops.squeeze_excite``). Lee and Park, "CenterMask:
    Real-Time Anchor-Free Instance Segmentation", arXiv 1911.06667.

    The key of the state dict (``fc``) is that of ``timm.layers.EffectiveSEModule``.

    Args:
        channels: channels C of the input; ``input_channels`` is the same.
        squeeze_channels: taken and ignored, as torchvision gives it to any ``se_layer``; so are timm's ``rd_*``,
            ``act_layer`` and ``norm_layer``.
        add_maxpool: squeeze with ``0.5 * mean + 0.5 * max``.
        gate_layer: a name, a module, or a class or partial that makes one; hardsigmoid or sigmoid.
            ``scale_activation`` is the same.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels that are no positive integer, an unknown gate.
        TypeError: an unknown keyword.

    Example:
        >>> y = convblocks.EffectiveSqueezeExcite(64)(torch.randn(2, 64, 56, 56))
        >>> model = timm.create_model("resnet50", block_args=dict(attn_layer=convblocks.EffectiveSqueezeExcite))
    """

    def __init__(
        self,
        channels: int | None = None,
        squeeze_channels: int | None = None,
        *,
        input_channels: int | None = None,
        add_maxpool: bool = False,
        gate_layer: Layer | None = None,
        scale_activation: Layer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        ignore("EffectiveSqueezeExcite", ignored)
        c = positive("EffectiveSqueezeExcite", "channels", input_channels if channels is None else channels)
        gate = scale_activation or gate_layer or "hardsigmoid"
        self.gate_name = function_name("EffectiveSqueezeExcite", "gate_layer", gate, GATES)
        self.add_maxpool = add_maxpool
        self.fc = nn.Conv2d(c, c, 1, device=device, dtype=dtype)

    forward = fused_one_layer_forward("fc")

    def unfused(self, x: Tensor) -> Tensor:
        return x * GATES[self.gate_name](self.fc(_squeeze(x, self.add_maxpool)))

    def extra_repr(self) -> str:
        return f"gate={self.gate_name}" + (", add_maxpool=True" if self.add_maxpool else "")
