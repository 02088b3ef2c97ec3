"""What the constructors of several blocks share: activations by any name, and the keywords of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

# An activation or gate as builders give it: "silu", nn.SiLU, partial(nn.SiLU, inplace=True), nn.SiLU().
Layer = str | Callable[..., nn.Module] | nn.Module

_ALIASES = {"swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid"}  # timm's spellings

# By qualified name, so that timm is never imported. timm makes classes of its own where torch's take no `inplace`.
FUNCTIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.ReLU6": "relu6",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Hardswish": "hardswish",
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hardsigmoid",
    "torch.nn.modules.linear.Identity": "none",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.HardSigmoid": "hardsigmoid",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations_me.HardSigmoidMe": "hardsigmoid",
    "timm.layers.activations_me.HardSwishMe": "hardswish",
    "timm.layers.activations_me.SwishMe": "silu",
}

# Keywords that timm's and torchvision's builders give to any attention layer; a block without a use for one ignores it.
_BUILDER_KEYWORDS = {
    "act_layer",
    "activation",
    "force_act_layer",
    "norm_layer",
    "rd_channels",
    "rd_divisor",
    "rd_ratio",
    "rd_round_fn",
    "scale_activation",
    "gate_layer",
}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def function_of(layer: nn.Module) -> str | None:
    """The name in ``convblocks.ops`` of what an activation module computes, or None if there is none."""
    name = FUNCTIONS.get(qualified_name(type(layer)))
    if name == "leaky_relu" and layer.negative_slope != 0.01:
        return None
    if name == "gelu" and getattr(layer, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


def function_name(block: str, keyword: str, layer: Layer, allowed: Collection[str]) -> str:
    """The name in ``convblocks.ops`` of an activation given as a name, a class, a partial or a module."""
    if isinstance(layer, str):
        name: str | None = _ALIASES.get(layer.lower(), layer.lower())
    else:
        try:
            module = layer if isinstance(layer, nn.Module) else layer()
        except TypeError:
            module = None
        if not isinstance(module, nn.Module):
            raise TypeError(f"{block}: expected {keyword} to be a name, a module or what makes one, got {layer!r}")
        layer, name = module, function_of(module)
    if name is None or name not in allowed:
        raise ValueError(f"{block}: expected {keyword} to be one of {', '.join(allowed)}, got {layer}")
    return name


def positive(block: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{block}: expected {name} to be a positive integer, got {value!r}")
    return value


def ignore(block: str, keywords: dict[str, Any]) -> None:
    """Lets the keywords of foreign builders pass and refuses any other."""
    unknown = sorted(keywords.keys() - _BUILDER_KEYWORDS)
    if unknown:
        raise TypeError(f"{block}: got an unexpected keyword {unknown[0]}")


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, at least one, and the next if that is less than 0.9 of ``value``: as
    MobileNets' channels are rounded."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
