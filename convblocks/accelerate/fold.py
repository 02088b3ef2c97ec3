"""Finds the layers of a model that can be computed as one, makes them so, and compares."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from convblocks.accelerate.folded import (
    ACTIVATION_LAYERS,
    CONVOLUTIONS,
    NORMS,
    OWN_DEPTHWISE,
    OWN_NORM,
    SAME,
    DenseFold,
    DepthwiseFold,
    Fold,
    NormFold,
)
from convblocks.accelerate.rule import Refused, become, replacement
from convblocks.blocks.arguments import function_of, qualified_name
from convblocks.blocks.fused import Layers
from convblocks.ops.gate import ACTIVATIONS

# Children of which each takes what the one before it gives, and nothing else does. So do all in any Sequential.
_EFFICIENTNET = "timm.models._efficientnet_blocks"
_BASIC = (("conv1", "bn1"), ("conv2", "bn2"))
_BOTTLENECK = (*_BASIC, ("conv3", "bn3"))
_STEM = (("conv_stem", "bn1"),)
_CHAINS: dict[str, tuple[tuple[str, ...], ...]] = {
    "timm.layers.conv_bn_act.ConvNormAct": (("conv", "bn"),),
    f"{_EFFICIENTNET}.ConvBnAct": (("conv", "bn1"),),
    f"{_EFFICIENTNET}.InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    f"{_EFFICIENTNET}.DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    f"{_EFFICIENTNET}.EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "timm.models.efficientnet.EfficientNet": (*_STEM, ("conv_head", "bn2")),
    "timm.models.mobilenetv3.MobileNetV3": _STEM,
    "timm.models.resnet.ResNet": (("conv1", "bn1"),),
    "timm.models.resnet.BasicBlock": _BASIC,
    "timm.models.resnet.Bottleneck": _BOTTLENECK,
    "timm.models.densenet.DenseLayer": (("conv1", "norm2"),),
    "torchvision.models.resnet.ResNet": (("conv1", "bn1"),),
    "torchvision.models.resnet.BasicBlock": _BASIC,
    "torchvision.models.resnet.Bottleneck": _BOTTLENECK,
    "torchvision.models.densenet._DenseLayer": (("norm1", "relu1"), ("conv1", "norm2")),
    "convblocks.blocks.depthwise_separable_conv.DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
}


def _chains(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Parents, and the names of layers of theirs that follow each other; then each layer alone."""
    for parent in model.modules():
        source, forward = qualified_name(type(parent)), type(parent).forward
        made = f"{forward.__module__}.{forward.__qualname__}"
        if "forward" in parent.__dict__:
            continue
        if made == f"{source}.forward":
            yield from ((parent, chain) for chain in _CHAINS.get(source, ()) if set(chain) <= parent._modules.keys())
        own = source.startswith("convblocks.") and made.startswith("convblocks.")
        if own:  # blocks of ours say which of their layers follow each other
            yield from ((parent, chain) for chain in getattr(parent, "chains", ()))
        if _is_sequential(parent):
            children = list(parent._modules)
            yield from ((parent, tuple(children[i : i + 3])) for i in range(len(children)))
    for parent in model.modules():
        yield from ((parent, (name,)) for name in parent._modules)


def _is_sequential(parent: nn.Module) -> bool:
    return isinstance(parent, nn.Sequential) and type(parent).forward in (nn.Sequential.forward, Layers.forward)


def _is_norm(layer: Any) -> bool:
    return qualified_name(type(layer)) in NORMS and layer.running_mean is not None


def _activation(norm: Any, after: list[Any]) -> tuple[str | None, int]:
    """What follows a norm, a name in ``convblocks.ops``, and how many layers after it that takes; None if unknown."""
    if hasattr(norm, "act"):  # timm's norm, which ends in one
        inside = function_of(norm.act) if type(norm.drop) is nn.Identity else None
        return inside if inside in ACTIVATIONS else None, 0
    if after and qualified_name(type(after[0])) in ACTIVATION_LAYERS and function_of(after[0]) in ACTIVATIONS:
        return function_of(after[0]), 1
    return "none", 0


def _of_convolution(parent: nn.Module, names: tuple[str, ...]) -> Fold | None:
    """Of a convolution and a norm after it; None if the layers are something else."""
    layers: list[Any] = [parent._modules[name] for name in names]
    if len(layers) < 2:
        return None
    conv, norm, *after = layers
    source = qualified_name(type(conv))
    if source not in CONVOLUTIONS or not _is_norm(norm) or norm.num_features != conv.out_channels:
        return None
    depthwise = 1 < conv.groups == conv.in_channels
    if qualified_name(type(norm)) == OWN_NORM:
        # Elsewhere it may be given a residual, to add before the activation.
        function = norm.function if _is_sequential(parent) else None
        activation: str | None = "none" if function is None else function
        count, ends = 0, function is None
    else:
        activation, count = _activation(norm, after)
        ends = False
    if depthwise:
        own = source == OWN_DEPTHWISE and (conv.activation_name != "none" or conv.padding_mode != "zeros")
        return None if activation is None or own else DepthwiseFold(parent, names[: 2 + count], activation, ends)
    drops = hasattr(norm, "drop") and type(norm.drop) is not nn.Identity
    if drops or conv.padding_mode != "zeros" or source == SAME:
        return None
    if activation is None or hasattr(norm, "act"):
        activation, count = "none", 0
    return DenseFold(parent, names[: 2 + count], activation, ends)


def _of_norm(parent: nn.Module, names: tuple[str, ...]) -> Fold | None:
    norm, *after = [parent._modules[name] for name in names]
    if not _is_norm(norm) or qualified_name(type(norm)) == OWN_NORM:  # which is one pass as it is
        return None
    activation, count = _activation(norm, after)
    return None if activation is None else NormFold(parent, names[: 1 + count], activation)


def folds(model: nn.Module) -> dict[int, Fold]:
    """What can be computed as one, by the id of the first layer."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    found: dict[int, Fold] = {}
    taken: set[int] = set()
    for make in (_of_convolution, _of_norm):
        for parent, names in list(_chains(model)):
            # What is used in another place, too, is followed by something else there.
            count = next((i for i, name in enumerate(names) if uses[id(parent._modules[name])] > 1), len(names))
            fold = make(parent, names[: max(count, 1)])
            layers = [] if fold is None else list(map(id, fold.layers.values()))
            if fold is not None and taken.isdisjoint(layers):
                found[layers[0]] = fold
                taken.update(layers)
    return found


def become_one(fold: Fold, backend: str) -> None:
    rules = [(layer, fold.rule_of(layer)) for layer in fold.layers.values()]
    for layer, rule in rules:
        become(layer, replacement(rule, backend), {"fold": fold})


def error(fold: Fold, backend: str) -> float:
    """The relative error of the folded layers on a small random input; raises Refused if it is not that of the layers.

    As for other replacements, four times the error of the layers in their own dtype is allowed, and a little.
    """
    copied = copy.deepcopy(type(fold)(nn.ModuleDict(fold.layers), tuple(fold.layers), fold.activation, fold.ends))
    layers = [layer.eval() for layer in copied.layers.values()]
    like = next((p for layer in layers for p in layer.parameters()), copied.norm.running_mean)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, copied.channels, *_sides(layers[0]), generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(like.device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        exact, before, after = x, x.to(like.dtype), x.to(like.dtype)
        for layer in layers:
            exact, before = copy.deepcopy(layer).double()(exact), layer(before)
        become_one(copied, backend)
        for layer in layers:
            after = layer(after)
    size = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
    missed_before, missed = (float((t.double() - exact).norm() / size) for t in (before, after))
    if not missed <= 4 * missed_before + 32 * torch.finfo(after.dtype).eps:
        raise Refused(f"what is folded is off by {missed:.1e} where the layers were off by {missed_before:.1e}")
    return missed


def _sides(first: Any) -> list[int]:
    """Height and width that give more than one pixel without padding."""
    if not hasattr(first, "kernel_size"):
        return [5, 6]
    sizes = zip(first.kernel_size, first.dilation, first.stride, strict=True)
    return [max(6, d * (k - 1) + 1 + s) for k, d, s in sizes]
