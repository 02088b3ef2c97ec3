from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name, function_of, ignore, positive, qualified_name
from convblocks.blocks.layers import fusible, is_plain
from convblocks.ops.checks import one_of
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.global_context import operator

POOLINGS = ("att", "avg")
FUSIONS = ("channel_add", "channel_mul")
# Of the channels of single pixels. By qualified name, so that timm is never imported.
NORMS = ("convblocks.blocks.global_context._ChannelNorm", "timm.layers.norm.LayerNorm2d")


@functools.cache
def is_norm(cls: type) -> bool:
    return qualified_name(cls) in NORMS


def _parameters(x: Tensor, transform: Any, activation: str) -> tuple[Any, ...] | None:
    """The six tensors of a transform and the eps of its norm, or None where it has become something else."""
    if transform is None:
        return (None,) * 7
    layers = transform._modules
    fc1, norm, fc2 = layers["fc1"], layers["norm"], layers["fc2"]
    kind: Any = type(norm)
    if (
        not is_plain(transform, type(transform))
        or not (is_norm(kind) and fusible(x, nn.Conv2d, fc1, fc2) and fusible(x, kind, norm))
        or not is_plain(layers["act"], type(layers["act"]))
        or function_of(layers["act"]) != activation
    ):
        return None
    parameters = (layer._parameters[name] for layer in (fc1, norm, fc2) for name in ("weight", "bias"))
    return (*parameters, norm.eps)


def fused_forward(run: Callable[..., Tensor] = operator) -> Callable[[Any, Tensor], Tensor]:
    """A forward that runs ``conv_attn``, ``mlp_scale`` and ``mlp_add`` as one operation, as that of
    ``blocks.squeeze_excite`` does."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = self._modules
        attention = layers.get("conv_attn")
        scale = _parameters(x, layers.get("mlp_scale"), self.activation_name)
        add = _parameters(x, layers.get("mlp_add"), self.activation_name)
        if (
            scale is None
            or add is None
            or (scale[6] != add[6] and None not in (scale[6], add[6]))
            or not (attention is None or fusible(x, nn.Conv2d, attention))
        ):
            y: Tensor = self.unfused(x)
            return y
        p = {"weight": None, "bias": None} if attention is None else attention._parameters
        eps = add[6] if scale[6] is None else scale[6]
        return run(x, p["weight"], p["bias"], *scale[:6], *add[:6], eps, self.activation_name, self.gate_name)

    return forward


class _ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "none": nn.Identity,
}


class _Transform(nn.Module):
    def __init__(self, channels: int, width: int, activation: str, eps: float, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, width, 1, **factory)
        self.norm = _ChannelNorm(width, eps=eps, **factory)
        self.act = _ACTIVATIONS[activation]()
        self.fc2 = nn.Conv2d(width, channels, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.norm(self.fc1(x))))
        return y


class GlobalContext(nn.Module):
    """Global context: scales and shifts every channel by what all pixels, weighted by attention, say together.

    ``y = x * gate(mlp_scale(c)) + mlp_add(c)`` with ``c`` the sum of the pixels, weighted by the softmax of
    ``conv_attn(x)``; one operation (``convblocks.ops.global_context``). Cao et al., "GCNet: Non-local Networks Meet
    Squeeze-Excitation Networks and Beyond", arXiv 1904.11492.

    The keywords and their defaults, and the keys of the state dict (``conv_attn``, ``mlp_scale`` and ``mlp_add`` with
    ``fc1``, ``norm``, ``fc2``) are those of ``timm.layers.GlobalContext``. ``GlobalContext.official`` makes the block
    of the paper's code and of mmcv, whose keys ``convert_state_dict`` reads.

    Args:
        channels: channels C of the input; ``input_channels`` is the same.
        squeeze_channels: width R of the hidden layers; ``rd_channels`` is the same.
        rd_ratio, rd_divisor: without the width, it is C * rd_ratio rounded to a multiple of rd_divisor, at least one.
        rd_round_fn: rounds C * rd_ratio in another way.
        use_attn: whether pixels are weighted; else c is their mean.
        fuse_add, fuse_scale: which of the two transforms there are; one at least.
        init_last_zero: the transforms begin as zero, as the official ones do. Else only the weight of mlp_add's last
            layer is zero, as in timm.
        eps: of the norms; 1e-6 as in timm, 1e-5 in the official block.
        act_layer: a name, a module, or a class or partial that makes one; relu, relu6, silu, gelu, gelu_tanh, hardswish
            or leaky_relu (slope 0.01). ``activation`` is the same, ``force_act_layer`` goes before both.
        gate_layer: likewise sigmoid or hardsigmoid; ``scale_activation`` is the same.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels or a width that are no positive integer, neither transform, an unknown activation or gate.
        TypeError: no channels, an unknown keyword.

    Example:
        >>> y = convblocks.GlobalContext(64)(torch.randn(2, 64, 56, 56))
        >>> y = convblocks.GlobalContext.official(64, 1 / 16)(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        channels: int | None = None,
        squeeze_channels: int | None = None,
        *,
        input_channels: int | None = None,
        use_attn: bool = True,
        fuse_add: bool = False,
        fuse_scale: bool = True,
        init_last_zero: bool = False,
        rd_ratio: float = 1 / 8,
        rd_channels: int | None = None,
        rd_divisor: int = 1,
        rd_round_fn: Callable[[float], int] | None = None,
        eps: float = 1e-6,
        act_layer: Layer | None = None,
        activation: Layer | None = None,
        force_act_layer: Layer | None = None,
        gate_layer: Layer | None = None,
        scale_activation: Layer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        block = "GlobalContext"
        ignore(block, ignored)
        c = positive(block, "channels", input_channels if channels is None else channels)
        r = rd_channels if squeeze_channels is None else squeeze_channels
        if r is None:
            width = c * rd_ratio
            r = rd_round_fn(width) if rd_round_fn else max(1, int(width / rd_divisor + 0.5)) * rd_divisor
        r = positive(block, "squeeze_channels", r)
        if not (fuse_add or fuse_scale):
            raise ValueError(f"{block}: expected fuse_add or fuse_scale, got neither")
        act = force_act_layer or activation or act_layer or "relu"
        self.activation_name = function_name(block, "act_layer", act, ACTIVATIONS)
        self.gate_name = function_name(block, "gate_layer", scale_activation or gate_layer or "sigmoid", GATES)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_attn = nn.Conv2d(c, 1, 1, **factory) if use_attn else None
        self.mlp_add = _Transform(c, r, self.activation_name, eps, **factory) if fuse_add else None
        self.mlp_scale = _Transform(c, r, self.activation_name, eps, **factory) if fuse_scale else None
        self.init_last_zero = init_last_zero
        self.reset_parameters()

    @classmethod
    def official(
        cls,
        inplanes: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: Sequence[str] = ("channel_add",),
        **options: Any,
    ) -> GlobalContext:
        """The ContextBlock of the paper's code and of mmcv, by its arguments.

        Raises ValueError for a ratio that leaves no channel, and for unknown types of pooling or fusion, or none.
        """
        one_of("GlobalContext", "pooling_type", pooling_type, POOLINGS)
        for fusion in fusion_types:
            one_of("GlobalContext", "fusion_types", fusion, FUSIONS)
        block = cls(
            inplanes,
            positive("GlobalContext", "inplanes * ratio", int(inplanes * ratio)),
            use_attn=pooling_type == "att",
            fuse_add="channel_add" in fusion_types,
            fuse_scale="channel_mul" in fusion_types,
            **{"init_last_zero": True, "eps": 1e-5, **options},
        )
        if block.conv_attn is not None and block.conv_attn.bias is not None:
            nn.init.zeros_(block.conv_attn.bias)
        return block

    def reset_parameters(self) -> None:
        if self.conv_attn is not None:
            nn.init.kaiming_normal_(self.conv_attn.weight, mode="fan_in", nonlinearity="relu")
        for transform in (self.mlp_scale, self.mlp_add):
            if transform is not None and (self.init_last_zero or transform is self.mlp_add):
                nn.init.zeros_(transform.fc2.weight)
                if self.init_last_zero and transform.fc2.bias is not None:
                    nn.init.zeros_(transform.fc2.bias)

    forward = fused_forward()

    def unfused(self, x: Tensor) -> Tensor:
        if self.conv_attn is None:
            c = x.mean((2, 3), keepdim=True)
        else:
            attention = self.conv_attn(x).flatten(2).softmax(-1)
            c = (x.flatten(2) @ attention.transpose(1, 2)).unsqueeze(-1)
        y = x if self.mlp_scale is None else x * GATES[self.gate_name](self.mlp_scale(c))
        return y if self.mlp_add is None else y + self.mlp_add(c)

    def extra_repr(self) -> str:
        return f"gate={self.gate_name}"
