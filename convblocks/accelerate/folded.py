"""Layers that are computed as one, for inference: a batch norm in the convolution before it, or with what follows it.

The layers stay where they are, with all that they hold. While no gradient is wanted and the norm is in eval mode, the
first of them computes what all do, and the others hand on what they get; else each does its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from convblocks.accelerate.rule import Forward, Rule, Run
from convblocks.blocks.arguments import FUNCTIONS, qualified_name
from convblocks.blocks.batch_norm_act import INPLACE, scale_shift
from convblocks.blocks.depthwise_conv2d import fused_forward, padding_of
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.operator import memory_format

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
PLAIN, SAME = "torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame"  # which pads as TensorFlow does
OWN_NORM = "convblocks.blocks.batch_norm_act.BatchNormAct2d"  # ends in a residual and an activation
OWN_DEPTHWISE = "convblocks.blocks.depthwise_conv2d.DepthwiseConv2d"
CONVOLUTIONS = (PLAIN, SAME, OWN_DEPTHWISE)
ACTIVATION_LAYERS = tuple(source for source in FUNCTIONS if source.startswith("torch."))
NORMS = (OWN_NORM, "torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d")

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


class Kept:
    """What was made of tensors, until one of them is another one, or was written to.

    ``.data`` does not count what is written through it: that is not noticed, before ``clear``.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._made: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles make it again
        return {"_made": None}

    def __call__(self, tensors: list[Tensor | None], settings: Any, make: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return make()
        if self._made is not None:
            known, signs, _, made = self._made
            if all(map(operator.is_, tensors, known)) and signs == _signs(tensors, settings):
                return made
        given = [t for t in tensors if t is not None]
        if not all(map(_is_plain, given)):
            return make()
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        # The memory stays theirs, so that its address is a sign.
        self._made = tensors, _signs(tensors, settings), [t.detach() for t in given], made
        return made


def _signs(tensors: list[Tensor | None], settings: Any) -> Any:
    return settings, [t is not None and (t._version, t.data_ptr()) for t in tensors]


def _is_plain(t: Tensor) -> bool:
    """Whether it is stored as it is, and counts what is written to it."""
    if not _is_unwrapped(t) or t.is_inference():
        return False
    return not (t.is_cpu and t.is_shared())  # by processes that count only their own writes


def _is_unwrapped(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


class Fold:
    """The layers that are one while it is ``active``.

    Attributes:
        parent: whose children they are.
        layers: by their names there: perhaps a convolution, a norm, and perhaps an activation.
        activation: what of that which follows the norm, in it or after it, is done here; a name in ``convblocks.ops``.
        ends: whether the norm, one of ours, does itself what follows it.
    """

    lead: str  # what the first layer's rule is called before the layer's class

    def __init__(self, parent: nn.Module, names: tuple[str, ...], activation: str, ends: bool = False) -> None:
        self.parent, self.activation, self.ends = parent, activation, ends
        self.layers: dict[str, Any] = {name: parent._modules[name] for name in names}
        self.kept = Kept()

    @property
    def first(self) -> Any:
        return next(iter(self.layers.values()))

    @property
    def norm(self) -> Any:
        return list(self.layers.values())[1]

    @property
    def channels(self) -> int:
        """Of the input."""
        count: int = self.first.in_channels
        return count

    def rule_of(self, layer: nn.Module) -> Rule:
        return RULES[_name(self.lead if layer is self.first else "Folded", qualified_name(type(layer)))]

    def active(self, layer: Any, x: Any) -> bool:
        """Whether ``layer``, given x, has its part in it: not if it is a replica of DataParallel's."""
        if torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy) or forward_ad._current_level >= 0:
            return False
        children, is_own = self.parent._modules, False
        for name, own in self.layers.items():
            state = own.__dict__
            if state.get("fold") is not self or children.get(name) is not own or any(state[hooks] for hooks in _HOOKS):
                return False
            is_own = is_own or own is layer
        norm, parameters = self.norm, self.first._parameters
        given = all({"weight", "bias"} <= layer.keys() for layer in (parameters, norm._parameters))
        learned = all(norm._buffers.get(name) is not None for name in ("running_mean", "running_var"))
        return is_own and given and learned and not norm.training

    def sources(self) -> list[Tensor | None]:
        """The tensors that scale, shift and weights are made of."""
        own, norm = self.first._parameters, self.norm
        buffers = [norm._buffers["running_mean"], norm._buffers["running_var"]]
        return [own["weight"], own["bias"], norm._parameters["weight"], norm._parameters["bias"], *buffers]

    def unfused(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            # One of ours does what follows the norm when it is called.
            x = nn.BatchNorm2d.forward(layer, x) if self.ends and layer is self.norm else layer.unfused(x)
        return x

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of convolution and norm as one."""
        conv = self.first
        weight = conv.weight.float() if conv.weight.dtype.itemsize == 2 else conv.weight
        scale, shift = scale_shift(self.norm, conv.bias)
        return weight * scale[:, None, None, None], shift

    def fits(self, x: Tensor) -> bool:
        """Whether a convolution takes x, and a norm what comes of it."""
        autocast = torch.is_autocast_enabled(x.device.type)
        return x.dim() == 4 and (x.dtype == self.first.weight.dtype or autocast)


class DepthwiseFold(Fold):
    lead = "Folding"

    @staticmethod
    def forward(same: bool | None, run: Run) -> Forward:
        """``same``: it pads as TensorFlow does; None: one of ours, which knows."""
        alone = None if same is None else fused_forward(same, run)

        def forward(self: Any, x: Tensor) -> Tensor:
            fold: Fold = self.fold
            if not fold.active(self, x):
                unfolded: Tensor = alone(self, x) if alone else self.unfused(x)
                return unfolded
            if not fold.fits(x):
                return fold.unfused(x)
            weight, bias = fold.weights()  # at each call, as they are few and no sign tells of all changes (``.data``)
            padding = padding_of(self, x, self.same if same is None else same)
            return run(x, weight, bias, self.stride, padding, self.dilation, fold.activation)

        return forward


# What the activations are called by oneDNN, and their numbers.
_ONEDNN: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "leaky_relu": ("leaky_relu", [0.01], ""),
}


def _packed_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, activation: str
) -> Tensor:
    how = padding, stride, dilation, groups, *_ONEDNN[activation]
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how)
    return y


class DenseFold(Fold):
    """An activation in timm's norm is called as the module that it is.

    On the CPU, in channels_last, the folded weights are kept as oneDNN lays them out for the first image: torch would
    do that at each call, which for one image takes up to a third of the time of a network.
    """

    lead = "FoldingDense"

    @staticmethod
    def forward(run: Run) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            fold: DenseFold = self.fold
            if not fold.active(self, x):
                fold.kept.clear()  # a step of training may follow that counts no write (fused optimizers)
                unfolded: Tensor = self.unfused(x)
                return unfolded
            if not fold.fits(x) or self.padding_mode != "zeros":
                return fold.unfused(x)
            norm, how = fold.norm, (self.stride, self.padding, self.dilation, self.groups)
            if fold.packs(x):
                pack = partial(fold.packed, list(x.shape))
                weight, bias = fold.kept(fold.sources(), (norm.eps, how), pack)
                y: Tensor = _packed_conv2d(x, weight, bias, *how, fold.activation)
            else:
                weight, bias = fold.kept(fold.sources(), norm.eps, fold.weights)
                y = INPLACE.get(fold.activation, ACTIVATIONS[fold.activation])(run(x, weight, bias, *how))
            act = norm._modules.get("act")
            return y if act is None else act(y)

        return forward

    def weights(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().weights()
        return weight.to(self.first.weight.dtype), bias.to(self.first.weight.dtype)

    def packed(self, size: list[int]) -> tuple[Tensor, Tensor]:
        conv, (weight, bias) = self.first, self.weights()
        how = conv.padding, conv.stride, conv.dilation, conv.groups
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *how, size), bias

    def packs(self, x: Tensor) -> bool:
        """Whether oneDNN has this convolution, and x fits it."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch.is_autocast_enabled("cpu"):
            return False
        conv = self.first
        known = _HAS_ONEDNN and torch._C._get_mkldnn_enabled() and isinstance(conv.padding, tuple)
        if not (known and x.is_cpu and x.dtype == torch.float32 and x.shape[1] == conv.in_channels):
            return False
        if memory_format(x) != torch.channels_last:  # in which the result is
            return False
        given = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, strict=True)
        return _is_unwrapped(x) and x.numel() > 0 and all(n + 2 * p > d * (k - 1) for n, p, d, k in given)


class NormFold(Fold):
    """A norm that no convolution takes in, with the activation in it or after it."""

    lead = "Fast"

    @property
    def norm(self) -> Any:
        return self.first

    @property
    def channels(self) -> int:
        count: int = self.norm.num_features
        return count

    @staticmethod
    def forward(run: Run) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            fold: NormFold = self.fold
            if not fold.active(self, x):
                fold.kept.clear()
                unfolded: Tensor = self.unfused(x)
                return unfolded
            scale, shift = fold.kept(fold.sources(), self.eps, partial(scale_shift, fold.norm))
            half = x.dtype in (torch.float16, torch.bfloat16) and scale.dtype == torch.float32
            if x.dim() != 4 or x.shape[1] != scale.shape[0] or not (half or x.dtype == scale.dtype):
                return fold.unfused(x)  # which says what is wrong
            return run(x, scale, shift, None, fold.activation)

        return forward


def _handing_on(run: Run) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = x if self.fold.active(self, x) else self.unfused(x)
        return y

    return forward


def _ending(run: Run) -> Forward:
    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fold: Fold = self.fold
        if not fold.active(self, x):
            y: Tensor = self.unfused(x, residual)
            return y
        if residual is not None and not fold.ends:
            raise RuntimeError(
                "BatchNormAct2d: expected no residual in a Sequential that is folded, got one: revert it"
            )
        y = self.end(x, residual) if fold.ends else x
        return y

    return forward


def _train(self: Any, mode: bool = True) -> Any:
    self.fold.kept.clear()
    return type(self).source.train(self, mode)


def _check_input_dim(self: Any, x: Any) -> None:
    if not isinstance(x, torch.fx.Proxy):  # a name in a graph, of which torch's norm would be a leaf
        type(self).source._check_input_dim(self, x)


def _name(prefix: str, source: str) -> str:
    """Of the class that a layer becomes; timm's norm has the name of ours."""
    own = "Own" if source.startswith("convblocks.") else ""
    return f"{prefix}{own}{source.rpartition('.')[2]}"


def _rule(prefix: str, source: str, operation: str, forward: Callable[[Run], Forward]) -> Rule:
    def no_check(module: Any) -> None: ...

    return Rule(
        _name(prefix, source),
        source,
        operation,
        forward,
        channels=lambda module: module.fold.channels,
        check=no_check,
        options={"fold": lambda module: module.fold},
        constants={"train": _train, **({"_check_input_dim": _check_input_dim} if source in NORMS else {})},
    )


# By the names of the classes that they make.
RULES = {
    rule.name: rule
    for rule in (
        _rule(DepthwiseFold.lead, PLAIN, "depthwise_conv2d", partial(DepthwiseFold.forward, False)),
        _rule(DepthwiseFold.lead, SAME, "depthwise_conv2d", partial(DepthwiseFold.forward, True)),
        _rule(DenseFold.lead, PLAIN, "conv2d", DenseFold.forward),
        _rule(DepthwiseFold.lead, OWN_DEPTHWISE, "depthwise_conv2d", partial(DepthwiseFold.forward, None)),
        _rule("Folded", OWN_NORM, "scale_shift_act", _ending),
        *(_rule(NormFold.lead, source, "scale_shift_act", NormFold.forward) for source in NORMS[1:]),
        *(_rule("Folded", source, "scale_shift_act", _handing_on) for source in (*NORMS[1:], *ACTIVATION_LAYERS)),
    )
}
