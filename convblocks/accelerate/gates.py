"""Rules for the attention blocks of other libraries: what they call their layers, and what must hold of these."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn

from convblocks.accelerate.rule import Refused, Rule, child
from convblocks.blocks import cbam as cbam_block
from convblocks.blocks import eca as eca_block
from convblocks.blocks import global_context as global_context_block
from convblocks.blocks import scse as scse_block
from convblocks.blocks import squeeze_excite as squeeze_excite_block
from convblocks.blocks.arguments import function_of, qualified_name
from convblocks.blocks.layers import is_plain
from convblocks.ops.gate import ACTIVATIONS, GATES


def _layer(module: nn.Module, name: str, cls: type[nn.Module]) -> Any:
    layer = child(module, name, cls)
    if not {"weight", "bias"} <= layer._parameters.keys():
        raise Refused(f"{name} computes its weight or bias (pruned, weight norm or spectral norm)")
    if layer.groups != 1 or set(layer.stride) != {1} or layer.padding_mode != "zeros":
        raise Refused(f"{name} has groups, a stride or a padding mode")
    return layer


def _pointwise(module: nn.Module, name: str) -> None:
    layer = _layer(module, name, nn.Conv2d)
    if layer.kernel_size != (1, 1) or layer.padding not in ((0, 0), "valid", "same"):
        raise Refused(f"{name} is not a 1x1 convolution")


def _function(name: str, allowed: Collection[str], module: nn.Module) -> str:
    layer = module._modules.get(name)
    function = None if layer is None else function_of(layer)
    if function is None or function not in allowed:
        raise Refused(f"{name} is {layer}; the operation has {', '.join(allowed)}")
    return function


def squeeze_excite(
    name: str,
    source: str,
    fc1: str,
    activation: str,
    fc2: str,
    gate: str,
    *,
    norm: str | None = None,
    pool: str | None = None,
) -> Rule:
    """A rule for layers called ``fc1``, ``activation``, ``fc2``, ``gate``, perhaps a ``norm`` and a ``pool``."""

    def check(module: Any) -> None:
        _pointwise(module, fc1)
        _pointwise(module, fc2)
        if norm is not None and type(module._modules[norm]) is not nn.Identity:
            raise Refused(f"it has a norm between its layers: {module._modules[norm]}")
        if pool is not None and child(module, pool, nn.AdaptiveAvgPool2d).output_size not in (1, (1, 1)):
            raise Refused(f"{pool} does not pool to one pixel")

    return Rule(
        name,
        source,
        "squeeze_excite",
        partial(squeeze_excite_block.fused_forward, fc1, fc2),
        channels=lambda module: module._modules[fc1].in_channels,
        check=check,
        options={
            "activation_name": partial(_function, activation, ACTIVATIONS),
            "gate_name": partial(_function, gate, GATES),
        },
        constants={"add_maxpool": False, "has_norm": False},  # an add_maxpool of the module's own goes before
    )


def effective_squeeze_excite(name: str, source: str, fc: str, gate: str) -> Rule:
    return Rule(
        name,
        source,
        "squeeze_excite",
        partial(squeeze_excite_block.fused_one_layer_forward, fc),
        channels=lambda module: module._modules[fc].in_channels,
        check=partial(_pointwise, name=fc),
        options={"gate_name": partial(_function, gate, GATES)},
        constants={"add_maxpool": False},
    )


def eca(name: str, source: str, gate: str, padding_mode: str) -> Rule:
    def check(module: Any) -> None:
        if getattr(module, "conv2", None) is not None:
            raise Refused("it has two convolutions (use_mlp)")
        layer = _layer(module, "conv", nn.Conv1d)
        k = layer.kernel_size[0]
        if (layer.in_channels, layer.out_channels, layer.dilation) != (1, 1, (1,)) or k % 2 == 0:
            raise Refused("conv is not one filter of an odd number of taps")
        padding = layer.padding if padding_mode == "zeros" else (module.padding + layer.padding[0],)
        if padding != (k // 2,):
            raise Refused("it does not pad to the same number of channels")

    return Rule(
        name,
        source,
        "eca",
        eca_block.fused_forward,
        channels=lambda module: 16 + module._modules["conv"].kernel_size[0],  # it takes any number
        check=check,
        options={"gate_name": partial(_function, gate, GATES)},
        constants={"padding_mode": padding_mode},
    )


def _transform_activation(module: Any) -> str:
    found = {_function("act", ACTIVATIONS, t) for t in _transforms(module).values()}
    if len(found) != 1:
        raise Refused(f"its transforms have different activations: {', '.join(sorted(found))}")
    return found.pop()


def _transforms(module: Any) -> dict[str, Any]:
    return {name: t for name in ("mlp_scale", "mlp_add") if (t := module._modules.get(name)) is not None}


def global_context(name: str, source: str) -> Rule:
    def check(module: Any) -> None:
        transforms = _transforms(module)
        if not transforms:
            raise Refused("it has no transform")
        if module._modules.get("conv_attn") is not None:
            _pointwise(module, "conv_attn")
        eps = set()
        for label, transform in transforms.items():
            if qualified_name(type(transform)) != "timm.layers.mlp.ConvMlp":
                raise Refused(f"{label} is a {qualified_name(type(transform))}, not a timm ConvMlp")
            for layer in ("fc1", "fc2"):
                _pointwise(transform, layer)
                if transform._modules[layer].bias is None:
                    raise Refused(f"{label}.{layer} has no bias")
            norm, drop = transform._modules["norm"], transform._modules["drop"]
            kind: Any = type(norm)
            if not global_context_block.is_norm(kind) or norm.weight is None or norm.bias is None:
                raise Refused(f"{label}.norm is {norm}, not a LayerNorm2d with weight and bias")
            if getattr(norm, "_fast_norm", False):
                raise Refused(f"{label}.norm is a fast one, which rounds elsewhere")
            if type(drop) is not nn.Dropout or drop.p != 0:
                raise Refused(f"{label}.drop is {drop}")
            eps.add(norm.eps)
        if len(eps) > 1:
            raise Refused("its norms have different eps")

    return Rule(
        name,
        source,
        "global_context",
        global_context_block.fused_forward,
        channels=lambda module: next(iter(_transforms(module).values())).fc1.in_channels,
        check=check,
        options={"activation_name": _transform_activation, "gate_name": partial(_function, "gate", GATES)},
    )


_CHANNEL = {"0": nn.AdaptiveAvgPool2d, "1": nn.Conv2d, "2": nn.ReLU, "3": nn.Conv2d, "4": nn.Sigmoid}
_SPATIAL = {"0": nn.Conv2d, "1": nn.Sigmoid}


def scse(name: str, source: str) -> Rule:
    """A rule for ``cSE(x)`` and ``sSE(x)``, two sequences of layers, added up."""

    def check(module: Any) -> None:
        for part, kinds in (("cSE", _CHANNEL), ("sSE", _SPATIAL)):
            layers = child(module, part, nn.Sequential)
            if layers._modules.keys() != kinds.keys():
                raise Refused(f"{part} has {len(layers)} layers, not {len(kinds)}")
            for key, kind in kinds.items():
                try:
                    _pointwise(layers, key) if kind is nn.Conv2d else child(layers, key, kind)
                except Refused as refusal:
                    raise Refused(f"{part}.{refusal}") from None
        if module.cSE[0].output_size not in (1, (1, 1)):
            raise Refused("cSE.0 does not pool to one pixel")
        if module.cSE[1].out_channels == 0:
            raise Refused("cSE.1 has no outputs")
        if module.sSE[0].out_channels != 1:
            raise Refused("sSE.0 has more than one output")

    return Rule(
        name,
        source,
        "scse",
        partial(scse_block.fused_forward, nn.Sequential, _CHANNEL, nn.Sequential, _SPATIAL),
        channels=lambda module: module._modules["sSE"]._modules["0"].in_channels,
        check=check,
        options={},
        constants={"mode": "add"},
    )


def cbam(name: str, source: str, light: bool) -> Rule:
    """A rule for timm's ``channel`` and ``spatial``; the norm of the latter is called."""
    kind = "Light" if light else ""
    classes = {
        part: f"timm.layers.cbam.{kind}{cls}" for part, cls in (("channel", "ChannelAttn"), ("spatial", "SpatialAttn"))
    }

    def check(module: Any) -> None:
        for part, cls in classes.items():
            found = module._modules.get(part)
            if found is None or qualified_name(type(found)) != cls:
                raise Refused(f"{part} is not a {cls}")
        for layer in ("fc1", "fc2"):
            _pointwise(module.channel, layer)
        block = module.spatial._modules["conv"]
        if (
            qualified_name(type(block)) != "timm.layers.conv_bn_act.ConvNormAct"
            or getattr(block, "aa", None) is not None
        ):
            raise Refused("spatial.conv is not a timm.layers.conv_bn_act.ConvNormAct as its class makes it")
        conv = _layer(block, "conv", nn.Conv2d)
        k = conv.kernel_size[0]
        if (conv.kernel_size, conv.padding, conv.dilation) != ((k, k), (k // 2, k // 2), (1, 1)) or k % 2 == 0:
            raise Refused("spatial.conv.conv does not convolve planes to one of the same size")

    def gate_name(module: Any) -> str:
        if light:
            return "sigmoid"  # whatever it was made with
        gates = {_function("gate", GATES, part) for part in (module.channel, module.spatial)}
        if len(gates) > 1:
            raise Refused(f"channel and spatial have different gates: {', '.join(sorted(gates))}")
        return gates.pop()

    def parts(module: Any) -> tuple[Any, Any] | None:
        channel, spatial = (module._modules[part]._modules for part in classes)
        block = spatial["conv"]
        gates = () if light else (channel["gate"], spatial["gate"])
        for layer, name in ((channel["act"], module.activation_name), *((gate, module.gate_name) for gate in gates)):
            if not is_plain(layer, type(layer)) or function_of(layer) != name:
                return None
        return (block._modules["conv"], block._modules["bn"]) if is_plain(block, type(block)) else None

    return Rule(
        name,
        source,
        "apply_gates",
        partial(cbam_block.fused_light_forward if light else cbam_block.fused_forward, parts),
        channels=lambda module: module._modules["channel"]._modules["fc1"].in_channels,
        check=check,
        options={
            "activation_name": lambda module: _function("act", ACTIVATIONS, module._modules["channel"]),
            "gate_name": gate_name,
        },
        constants={"residual": False},
        others=("squeeze_excite" if light else "channel_attention", "channel_pool", "depthwise_conv2d"),
    )
