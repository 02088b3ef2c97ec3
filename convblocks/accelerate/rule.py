"""What a rule is, and the class that a module of the rule's source becomes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convblocks import backends
from convblocks.blocks.arguments import qualified_name
from convblocks.ops.operator import Operator

BACKENDS = tuple(b for b in backends.BACKENDS if b != "triton")  # it takes the place of another one, in all calls
Run = Callable[..., Tensor]
Forward = Callable[[Any, Tensor], Tensor]


class Refused(Exception):
    """Why a module stays as it is."""


@dataclass(frozen=True, eq=False)
class Rule:
    """How the modules of one foreign class are replaced.

    Args:
        name: of the class that they become.
        source: the qualified name of their class. Whoever made a module has imported its library; nothing here does.
        operation: what runs instead, a name in ``convblocks.ops``; or in ``torch.nn.functional``, if that runs.
        forward: makes the forward of the new class, given what runs the operation, and what runs ``others``. It finds
            the old forward in ``self.unfused``.
        channels: the number of channels that a module takes.
        check: raises Refused with what keeps a module from being replaced.
        options: attributes that the forward needs, and how to read each from a module; may raise Refused.
        constants: attributes that the forward needs and that are the same for all modules of the class.
        applies: whether a module of the class is one of those that the rule is about; others are not reported.
        pixels: height and width that a module takes.
        methods: names of those of which a module has bound one as its forward; its name is then the option
            ``forward_name``.
        differentiable: whether a module has gradients to compare.
        others: further operations of the forward.
        calls_children: whether the forward calls them as the old one does, hooks, parametrizations and all.
    """

    name: str
    source: str
    operation: str
    forward: Callable[..., Forward]
    channels: Callable[[Any], int]
    check: Callable[[Any], None]
    options: Mapping[str, Callable[[Any], Any]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    applies: Callable[[Any], bool] = lambda module: True
    pixels: Callable[[Any], tuple[int, int]] = lambda module: (5, 6)
    methods: tuple[str, ...] = ()
    differentiable: Callable[[Any], bool] = lambda module: True
    others: tuple[str, ...] = ()
    calls_children: bool = False


def child(module: nn.Module, name: str, cls: type[nn.Module]) -> Any:
    """The child ``name``, which must be of this very class."""
    found = module._modules.get(name)
    if type(found) is not cls:
        got = "missing" if found is None else f"a {qualified_name(type(found))}"
        raise Refused(f"{name} is {got}, not a torch.nn.{cls.__name__}")
    return found


class Accelerated:
    """Marks the replacements. Each is a subclass of what it replaces, too, so that ``isinstance`` says what it did."""

    rule: Rule
    source: type[nn.Module]

    def __setattr__(self, name: str, value: Any) -> None:
        assert isinstance(self, nn.Module)
        # The options were read from the child that goes now. A replica of DataParallel only gets its own copies.
        if name in self.__dict__.get("_modules", ()) and "_is_replica" not in self.__dict__:
            restore(self)
        nn.Module.__setattr__(self, name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert isinstance(self, nn.Module)
        if name in self._modules:
            restore(self)
        nn.Module.add_module(self, name, module)


def _bound(self: Any, x: Tensor) -> Tensor:
    """The forward that a module had bound."""
    y: Tensor = getattr(type(self).source, self.forward_name)(self, x)
    return y


def _run_on(backend: str, operator: Operator) -> Run:
    """Runs an operation on one backend, whatever ``use_backend`` says; without it, for it holds for all threads."""

    def run(*args: Any) -> Tensor:
        return operator.run_on(backend, args)

    return run


@functools.cache
def replacement(rule: Rule, backend: str) -> type[nn.Module]:
    """The subclass of the rule's source that runs the operation on a backend. One per backend: "auto" costs no check.

    The class says that it lives in ``convblocks.accelerate.classes``, where unpickling finds (and makes) it.
    """
    module, _, name = rule.source.rpartition(".")
    source = getattr(importlib.import_module(module), name)
    runs: list[Run] = []
    for operation in (rule.operation, *rule.others):
        operator = backends.operators.get(operation)
        if operator is None:
            runs.append(getattr(F, operation))
        else:
            runs.append(operator if backend == "auto" else _run_on(backend, operator))
    forward = rule.forward(*runs)
    return type(
        rule.name if backend == "auto" else f"{rule.name}_{backend}",
        (Accelerated, source),
        {
            "__module__": "convblocks.accelerate.classes",
            "__doc__": f"{rule.source} that runs {rule.operation} in its place.",
            "rule": rule,
            "source": source,
            "forward": forward,
            "unfused": _bound if rule.methods else source.forward,
            **rule.constants,
        },
    )


def become(module: nn.Module, cls: type[nn.Module], options: Mapping[str, Any]) -> None:
    module.__dict__.update(options)
    module.__dict__.pop("forward", None)
    module.__class__ = cls


def check_restorable(module: nn.Module) -> None:
    cls = type(module)
    if "rule" not in vars(cls):
        raise RuntimeError(f"revert: expected a replaced module as accelerate() left it, got a {cls.__name__} of it")


def restore(module: nn.Module) -> None:
    """Makes a replaced module what it was."""
    check_restorable(module)
    cls: Any = type(module)
    module.__class__ = cls.source
    options = {name: module.__dict__.pop(name) for name in cls.rule.options}
    if cls.rule.methods:
        module.forward = getattr(module, options["forward_name"])
