"""Folds a batch norm, and the activation after it, into the depthwise convolution before them, for inference.

The three layers stay where they are, with all that they hold. While no gradient is wanted and the norm is in eval mode,
the convolution computes what the three do, and the other two hand on what they get; else each does its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from convblocks.accelerate.rule import Forward, Refused, Rule, Run, become, replacement
from convblocks.blocks.arguments import FUNCTIONS, function_of, qualified_name
from convblocks.blocks.depthwise_conv2d import fused_forward, padding_of
from convblocks.ops.gate import ACTIVATIONS

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_CONVOLUTIONS = {"torch.nn.modules.conv.Conv2d": False, "timm.layers.conv2d_same.Conv2dSame": True}
_NORMS = ("torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d")

# Where a convolution's output goes to a norm and nowhere else. In any Sequential, the children follow each other.
_PAIRS = {
    "timm.layers.conv_bn_act.ConvNormAct": ("conv", "bn"),
    "timm.models._efficientnet_blocks.InvertedResidual": ("conv_dw", "bn2"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": ("conv_dw", "bn1"),
    "convblocks.blocks.depthwise_separable_conv.DepthwiseSeparableConv": ("conv_dw", "bn1"),
}


class Fold:
    """The layers that are one while it is ``active``.

    Attributes:
        parent: whose children they are.
        layers: by their names there: the convolution, the norm, and perhaps an activation.
        activation: what follows the norm, in it or after it; a name in ``convblocks.ops``.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], activation: str) -> None:
        self.parent, self.activation = parent, activation
        self.layers: dict[str, Any] = {name: parent._modules[name] for name in names}

    def active(self, layer: Any, x: Any) -> bool:
        """Whether ``layer``, given x, has its part in it: not if it is a replica of DataParallel's."""
        conv, norm, *_ = self.layers.values()
        if not any(layer is own for own in self.layers.values()):
            return False
        if torch.is_grad_enabled() or norm.training or isinstance(x, torch.fx.Proxy) or forward_ad._current_level >= 0:
            return False
        children = self.parent._modules
        if any(children.get(name) is not layer for name, layer in self.layers.items()):
            return False
        if any(getattr(layer, hooks) for layer in self.layers.values() for hooks in _HOOKS):
            return False
        return "weight" in conv._parameters and norm.running_mean is not None

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layers as one. Made at each call, as no sign tells of all changes (``.data``)."""
        conv, norm, *_ = self.layers.values()
        weight, bias, mean, var = conv.weight, conv.bias, norm.running_mean, norm.running_var
        gamma, beta = norm.weight, norm.bias
        if weight.dtype.itemsize == 2:
            parts = (weight, bias, mean, var, gamma, beta)
            weight, bias, mean, var, gamma, beta = (t if t is None else t.float() for t in parts)
        scale = (var + norm.eps).rsqrt_()
        scale = scale if gamma is None else scale * gamma
        mean = mean if bias is None else mean - bias
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        return weight * scale[:, None, None, None], shift


def _convolution(same: bool, run: Run) -> Forward:
    alone = fused_forward(same, run)

    def forward(self: Any, x: Tensor) -> Tensor:
        fold: Fold = self.fold
        if not fold.active(self, x):
            return alone(self, x)
        if x.dim() == 4 and (x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type)):
            weight, bias = fold.weights()
            padding = padding_of(self, x, same)
            return run(x, weight, bias, self.stride, padding, self.dilation, fold.activation)
        y: Tensor = self.unfused(x)
        for layer in list(fold.layers.values())[1:]:
            y = layer.unfused(y)
        return y

    return forward


def _handing_on(run: Run) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = x if self.fold.active(self, x) else self.unfused(x)
        return y

    return forward


def _rule(name: str, source: str, forward: Callable[[Run], Forward]) -> Rule:
    def no_check(module: Any) -> None: ...

    return Rule(
        name,
        source,
        "depthwise_conv2d",
        forward,
        channels=lambda module: module.in_channels,
        check=no_check,
        options={"fold": lambda module: module.fold},
    )


RULES = {
    source: _rule(f"{prefix}{source.rpartition('.')[2]}{suffix}", source, forward)
    for prefix, suffix, sources in (
        ("Folding", "", {s: partial(_convolution, same) for s, same in _CONVOLUTIONS.items()}),
        ("Folded", "", dict.fromkeys(_NORMS, _handing_on)),
        ("Folded", "", {s: _handing_on for s in FUNCTIONS if s.startswith("torch.")}),
    )
    for source, forward in sources.items()
}


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Parents, and the names of layers of theirs that follow each other."""
    for parent in model.modules():
        pair = _PAIRS.get(qualified_name(type(parent)))
        if pair is not None and set(pair) <= parent._modules.keys():
            yield parent, pair
        elif isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            children = list(parent._modules)
            for i in range(len(children) - 1):
                yield parent, tuple(children[i : i + 3])


def _fold(parent: nn.Module, names: tuple[str, ...]) -> Fold | None:
    """Of a depthwise convolution, a norm after it, and perhaps an activation; None if they are something else."""
    layers: list[Any] = [parent._modules[name] for name in names]
    conv, norm = layers[:2]
    if qualified_name(type(conv)) not in _CONVOLUTIONS or not 1 < conv.groups == conv.in_channels:
        return None
    if qualified_name(type(norm)) not in _NORMS or norm.num_features != conv.out_channels or norm.running_mean is None:
        return None
    if hasattr(norm, "act"):  # timm's norm, which ends in an activation
        inside = "none" if norm.act is None else function_of(norm.act)
        known = inside in ACTIVATIONS and type(norm.drop) is nn.Identity
        return Fold(parent, names[:2], str(inside)) if known else None
    after = function_of(layers[2]) if len(layers) == 3 else None
    if after in ACTIVATIONS and qualified_name(type(layers[2])) in RULES:
        return Fold(parent, names, str(after))
    return Fold(parent, names[:2], "none")


def folds(model: nn.Module) -> dict[int, Fold]:
    """What can be folded, by the id of the convolution."""
    found: dict[int, Fold] = {}
    for parent, names in _candidates(model):
        fold = _fold(parent, names)
        if fold is not None:
            found[id(parent._modules[names[0]])] = fold
    return found


def become_one(fold: Fold, backend: str) -> None:
    for layer in fold.layers.values():
        become(layer, replacement(RULES[qualified_name(type(layer))], backend), {"fold": fold})


def error(fold: Fold, backend: str) -> float:
    """The relative error of the folded layers on a small random input; raises Refused if it is not that of the layers.

    As for other replacements, four times the error of the layers in their own dtype is allowed, and a little.
    """
    copied = copy.deepcopy(Fold(nn.ModuleDict(fold.layers), tuple(fold.layers), fold.activation))
    layers = [layer.eval() for layer in copied.layers.values()]
    conv = layers[0]
    generator = torch.Generator().manual_seed(0)
    sides = [max(6, d * (k - 1) + 1 + s) for k, d, s in zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)]
    x = torch.randn(2, conv.in_channels, *sides, generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(conv.weight.device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        exact, before, after = x, x.to(conv.weight.dtype), x.to(conv.weight.dtype)
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
