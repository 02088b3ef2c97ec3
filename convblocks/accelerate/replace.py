"""The pass over a model: finds candidates, checks each, replaces it, and undoes that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from convblocks import backends
from convblocks.accelerate import fold
from convblocks.accelerate import verify as verification
from convblocks.accelerate.classes import RULES
from convblocks.accelerate.folded import Fold
from convblocks.accelerate.report import Entry, Report
from convblocks.accelerate.rule import (
    BACKENDS,
    Accelerated,
    Refused,
    Rule,
    become,
    check_restorable,
    replacement,
    restore,
)
from convblocks.blocks.arguments import qualified_name
from convblocks.ops.checks import FLOATING

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "it is inside a compiled module: accelerate before torch.compile",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "it is inside an FSDP module: accelerate before sharding"
    ),
}


def _candidates(model: nn.Module, folds: dict[int, Fold]) -> Iterator[tuple[str, nn.Module, Rule, str | None]]:
    """Modules of known classes, of subclasses of these, scripted ones, and the first layer of each fold; with the
    reason why not if one is plain."""
    scripted = {rule.source.rpartition(".")[2]: rule for rule in RULES.values()}
    wrappers: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        wrapper = _WRAPPERS.get(qualified_name(type(module)))
        if wrapper is None and module._compiled_call_impl is not None:
            wrapper = "it is compiled, or inside a compiled module: accelerate before compile()"
        if wrapper is not None:
            wrappers.append((f"{name}." if name else "", wrapper))
        inside = next((why for prefix, why in wrappers if f"{name}.".startswith(prefix)), None)
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in scripted and scripted[module.original_name].applies(module):
                yield name, module, scripted[module.original_name], "it is scripted or traced"
        elif qualified_name(type(module)) in RULES and RULES[qualified_name(type(module))].applies(module):
            yield name, module, RULES[qualified_name(type(module))], inside
        elif id(module) in folds:
            yield name, module, folds[id(module)].rule_of(module), inside
        else:
            bases = (qualified_name(base) for base in type(module).__mro__)
            found = next((RULES[base] for base in bases if base in RULES), None)
            if found is not None and found.applies(module):
                yield name, module, found, _why_subclass(module, found)


def _why_subclass(module: nn.Module, rule: Rule) -> str:
    if isinstance(module, Accelerated):
        return "already accelerated"
    if is_parametrized(module):
        return "it is parametrized"
    if any(base.__module__.startswith("torch.distributed.") for base in type(module).__mro__):
        return "it is wrapped by FSDP: accelerate before sharding"
    return f"it is a {qualified_name(type(module))}, a subclass of {rule.source}"


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _check(module: nn.Module, rule: Rule) -> None:
    """Raises Refused if something about the module or its children would be lost, or if the rule does not hold."""
    parts = [("", module)] if rule.calls_children else list(module.named_modules())
    for name, part in parts:
        label = name or "it"
        if is_parametrized(part):
            raise Refused(f"{label} is parametrized")
        if "forward" in part.__dict__ and not (part is module and rule.methods):
            raise Refused(f"the forward of {name or 'the module'} is overridden on the instance")
        for p in part._parameters.values():
            if p is not None and type(p) is not nn.Parameter:
                raise Refused(f"{label} has a {type(p).__name__} for a parameter")
            if p is not None and p.dtype not in FLOATING:
                raise Refused(f"{label} has parameters of {p.dtype}")
    if rule.methods:
        bound = module.__dict__.get("forward")
        if bound not in [getattr(module, name) for name in rule.methods]:
            raise Refused("the forward of the module is not one of its class")
    for name in rule.methods or ("forward",):
        method = getattr(type(module), name)
        inherited = {f"{qualified_name(base)}.{name}" for base in type(module).__mro__}
        if f"{method.__module__}.{method.__qualname__}" not in inherited:
            raise Refused("the forward of its class is overridden")
    rule.check(module)
    for name, part in parts:
        if _has_hooks(part):
            raise Refused(f"{name or 'it'} has hooks")


def _check_plain(layer: nn.Module, label: str) -> None:
    """Of a layer that is to be folded."""
    if is_parametrized(layer) or "forward" in layer.__dict__:
        raise Refused(f"{label} is parametrized, or has a forward of its own")
    if any(map(_has_hooks, layer.modules())):
        raise Refused(f"{label} has hooks")


def _matches(patterns: str | Sequence[str], name: str, module: nn.Module) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(n, p) for p in patterns for n in (name, qualified_name(type(module))))


def _plan(
    name: str,
    module: nn.Module,
    rule: Rule,
    backend: str,
    verify: str,
    model: nn.Module,
    found: Fold | None,
) -> tuple[Entry, Callable[[], None]]:
    """What will be done to a module, and the act itself; or raises Refused. Changes nothing."""
    _check(module, rule)
    cls = replacement(rule, backend)
    if type(module) is not cls.source:  # type: ignore[attr-defined]
        raise Refused(f"its class is another {rule.source} than the one that is imported")
    # One without parameters is taken to run where the model does.
    every = itertools.chain(module.parameters(), model.parameters())
    parameter = next((p for p in every if p.dtype in FLOATING), torch.empty(0))
    runs_on = "torch"
    if rule.operation in backends.operators:
        reason = backends.why_not(rule.operation, backend, parameter)
        if reason is not None:
            raise RuntimeError(f"accelerate: expected {rule.operation} to run on backend {backend}, got none: {reason}")
        runs_on = backends.which(rule.operation, parameter) if backend == "auto" else backend
    entry = Entry(name, rule.source, rule.operation, runs_on, True, "")
    if found is not None:
        try:
            for label, layer in found.layers.items():
                _check_plain(layer, label)
            error = None if verify == "off" or parameter.is_meta else fold.error(found, backend)
        except Refused as e:
            if rule is found.rule_of(module):
                raise
            entry = replace(entry, reason=f"no norm is folded in: {e}")
        else:
            rest = ", ".join(list(found.layers)[1:])
            remark = f"with {rest} folded in" if rest else "for inference"
            return replace(entry, reason=remark, error=error), partial(fold.become_one, found, backend)
    options = {attribute: read(module) for attribute, read in rule.options.items()}
    if verify == "off":
        entry = replace(entry, reason=entry.reason or "not compared")
    elif parameter.is_meta:
        entry = replace(entry, reason="not compared: it has no data (meta device)")
    elif any(map(_has_hooks, module.modules())):
        entry = replace(entry, reason="not compared: hooks in it would run")
    else:
        entry = replace(entry, error=verification.error(rule, module, cls, options, parameter))
    return entry, partial(become, module, cls, options)


def accelerate(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
    verify: Literal["sample", "off"] = "sample",
    fold_bn: bool = False,
    dry_run: bool = False,
    strict: bool = False,
) -> Report:
    """Replaces the blocks of a model that are known to be computed faster, in place, and says what it did.

    A replaced module gets a subclass of its class with another forward; its parameters, its children, the keys of the
    state dict, ``isinstance``, ``deepcopy``, ``torch.save``, ``train()`` and ``eval()`` are as before. It does not call
    its children any more. So modules with hooks, and those that are parametrized, pruned, quantised, compiled,
    scripted, sharded or different in any way from what their class does stay as they are, and the report says why. If
    later one of its convolutions is pruned, parametrized or hooked, or a child is replaced, the original forward runs
    again; only hooks that are put later on an activation do not run. It takes (N, C, H, W); torchvision's took
    (C, H, W), too. A unit of ShuffleNet V2 calls its branches as before, whatever is done to their layers; its output
    keeps channels_last, which torchvision's loses.

    Known classes: of timm SEModule, SqueezeExcite of the EfficientNets, SEModule of the legacy SENets,
    EffectiveSEModule, EseModule, EcaModule, CecaModule, Conv2dSame where it is depthwise, and Partial_conv3;
    SqueezeExcitation and the InvertedResidual of ShuffleNet V2 of torchvision; SEModule of segmentation_models_pytorch;
    of torch itself ChannelShuffle, and Conv2d where it is depthwise. With ``fold_bn`` also other Conv2d, BatchNorm2d
    and timm's BatchNormAct2d.

    Call it after ``model.to(...)`` and before ``torch.compile``, ``torch.jit`` and ``fully_shard``.
    DistributedDataParallel may come before or after.

    Args:
        model: any module; a replaced one may be the model itself.
        include, exclude: patterns as of a shell ("layer4.*", "timm.*") for the name of a module in the model or the
            qualified name of its class. Without include, all.
        filter_fn: called with a module and its name; False leaves it out.
        backend: "auto" takes the best backend at every call, and heeds ``use_backend``. "reference", "cpu" or "cuda"
            keeps these modules on that one.
        verify: "sample" compares the output and all gradients of each module with the original's, on copies and a
            small random input on its device and in its dtype, and leaves it where they do not agree. "off" does not.
        fold_bn: folds each batch norm in eval mode into the convolution before it, wherever no gradient is wanted: in a
            Sequential, and in the blocks of timm's and torchvision's EfficientNets, MobileNets, ResNets and DenseNets.
            A depthwise one also takes in the activation after it; so does a norm that has no such convolution before
            it, which is then one pass. All layers keep their parameters, and do their own in training. What the first
            of them alone gives is then what all give; a hook on one of them ends that. The weights of a dense
            convolution are folded again after each change; but one that torch does not count (through ``.data``, by
            ``torch.distributed``) only after ``train``, ``eval`` or a call with gradients.
        dry_run: checks and reports only.
        strict: raises if a module that was asked for cannot be replaced, and replaces none.

    Returns:
        A report that prints as a table; with ``replaced``, ``skipped`` and ``to_json()``.

    Raises:
        TypeError: model is not a module.
        ValueError: an unknown backend or verify.
        RuntimeError: the named backend cannot run here; or what strict says.

    Example:
        >>> model = timm.create_model("seresnet50")
        >>> len(convblocks.accelerate(model).replaced)
        16
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    if verify not in ("sample", "off"):
        raise ValueError(f"accelerate: expected verify to be sample or off, got {verify}")
    if backend not in BACKENDS:
        hint = " (use_backend and CONVBLOCKS_BACKEND choose it for the process)" if backend == "triton" else ""
        raise ValueError(f"accelerate: expected a backend of {', '.join(BACKENDS)}, got {backend}{hint}")
    entries: list[Entry] = []
    acts: list[Callable[[], None]] = []
    missing: list[str] = []
    folds = fold.folds(model) if fold_bn else {}
    for name, module, rule, reason in _candidates(model, folds):
        asked = False
        if include is not None and not _matches(include, name, module):
            reason = "not in include"
        elif exclude is not None and _matches(exclude, name, module):
            reason = "in exclude"
        elif filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn says no"
        else:
            asked = not isinstance(module, Accelerated)
        found = folds.get(id(module))
        if reason is None and found is not None:
            for label, layer in list(found.layers.items())[1:]:
                own = f"{name.rpartition('.')[0]}.{label}".lstrip(".")
                if exclude is not None and _matches(exclude, own, layer):
                    reason = f"{label}, which would be folded in, is in exclude"
                elif filter_fn is not None and not filter_fn(layer, own):
                    reason = f"filter_fn says no to {label}, which would be folded in"
        try:
            if reason is not None:
                raise Refused(reason)
            entry, act = _plan(name, module, rule, backend, verify, model, found)
            acts.append(act)
        except Refused as e:
            entry = Entry(name, rule.source, rule.operation, "", False, str(e))
            if asked:
                missing.append(f"{name or 'the model'}: {e}")
        entries.append(entry)
    report = Report(type(model).__name__, dry_run, entries)
    if strict and missing:
        raise RuntimeError(f"accelerate: expected to replace all that was asked for, got {'; '.join(missing)}")
    if strict and include is not None and all(e.reason == "not in include" for e in entries):
        raise RuntimeError(f"accelerate: expected include to match a module of a known class, got {include!r}")
    if not dry_run:
        for act in acts:
            act()
    return report


def revert(model: nn.Module) -> None:
    """Undoes ``accelerate``: every replaced module in the model gets its own class back, and nothing else changes.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a replaced module was parametrized or sharded since.

    Example:
        >>> model = timm.create_model("seresnet50")
        >>> _ = convblocks.accelerate(model)
        >>> convblocks.revert(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: expected a torch.nn.Module, got {type(model).__name__}")
    replaced = [module for module in model.modules() if isinstance(module, Accelerated)]
    for module in replaced:  # all or none
        check_restorable(module)
    for module in replaced:
        restore(module)


def is_accelerated(module: nn.Module) -> bool:
    """Whether a module has been replaced by ``accelerate`` (the module itself, not one inside it)."""
    return isinstance(module, Accelerated)
