"""Defines an operation: its name in the dispatcher, its checks, its torch reference, and who computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convblocks import backends
from convblocks.ops import checks

_library = torch.library.Library("convblocks", "FRAGMENT")  # alive for ever: its end would take the operators away


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of an operation's output: channels_last if x is so laid out (dense or not), else contiguous."""
    if isinstance(x.shape[0], Tensor):  # while torch.jit traces
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.channels_last if channels_last else torch.contiguous_format
    (n, c, h, w), (_, sc, sh, sw) = x.shape, x.stride()
    if (
        n == 1 and c > 1 and h * w > 1 and sc == 1 and (w == 1 or sw == c) and (h == 1 or sh == w * c)
    ):  # any batch stride
        return torch.channels_last
    return torch._prims_common.suggest_memory_format(x)


def first_map(maps: Any) -> Any:
    """Of an operation's first argument, which is a map or a list of maps; None of an empty list."""
    return next(iter(maps), None) if isinstance(maps, (tuple, list)) else maps


class Operator:
    """One operation. Calling it runs ``torch.ops.convblocks.<name>``, or the backend that ``use_backend`` names.

    With the compiled part the dispatcher operator has kernels, gradients and transforms of its own; without it, it is
    the reference, which torch differentiates and decomposes.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        check: Callable[..., None],
        reference: Callable[..., Any],
        *,
        linear: bool = False,  # in its maps, its only tensors: the backward takes no map
        check_backward: Callable[..., None] | None = None,  # of one that takes a list of maps
        output_size: Callable[..., Sequence[int]] = lambda x, *args: x.shape,
        arguments: Callable[..., tuple[Any, ...]] = lambda *args: args,  # those of the dispatcher from a call's
        variant_of: str = "",  # the operation that it is with outputs besides, and whose gradients it takes
        inplace: bool = False,  # has a second form in the dispatcher, ``<name>_``, that writes over its map
    ) -> None:
        self.name, self.check, self.reference, self.linear = name, check, reference, linear
        self.variant_of, self.inplace = variant_of, inplace
        self.output_size, self.arguments, self._check_backward = output_size, arguments, check_backward
        backends.load_extension()
        if backends.extension_error is None and not hasattr(torch.ops.convblocks, name):
            backends.stale.add(name)
        if backends.extension_error is not None or name in backends.stale:
            _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
            _library.impl(name, self.run_reference, "CompositeImplicitAutograd")
        self.packet = getattr(torch.ops.convblocks, name)
        backends.register(self)

    def __call__(self, *args: Any) -> Tensor:
        if backends.selected != "auto":
            return self.run_on(backends.selected, args)
        y: Tensor = self.packet(*args)
        return y

    def run_on(self, backend: str, args: Sequence[Any]) -> Tensor:
        if backend == "reference":
            expected: Tensor = self.run_reference(*args)
            return expected
        self._check_runs(backend, args)
        y: Tensor = self.packet(*args)
        return y

    def handing_on(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """The result, and x for what comes after: this adds its gradient of x to theirs if a kernel can."""
        packet = getattr(torch.ops.convblocks, f"_{self.name}_handing_on", None)
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() or isinstance(x, torch.fx.Proxy)
        if packet is None or traced or backends.selected not in ("auto", "cpu") or not (x.is_cpu and x.requires_grad):
            return self(x, *args), x
        if backends.selected == "cpu":
            self._check_runs("cpu", (x,))
        both: tuple[Tensor, Tensor] = packet(x, *args)
        return both

    def run_inplace(self, x: Tensor, *args: Any) -> Tensor:
        """Writes over x, which is returned."""
        if backends.selected not in ("auto", "reference"):
            self._check_runs(backends.selected, (x,))
        packet = getattr(torch.ops.convblocks, f"{self.name}_", None)
        if backends.selected == "reference" or packet is None:
            self.check(x, *args)
            return x.copy_(self.reference(x, *args))
        packet(x, *args)
        return x

    def _check_runs(self, backend: str, args: Sequence[Any]) -> None:
        reason = backends.why_not(self.name, backend, first_map(args[0]))
        if reason is not None:
            raise RuntimeError(f"{self.name}: expected to run on backend {backend}, got none: {reason}")

    def check_backward(self, grad: Tensor, *args: Any) -> None:
        if self._check_backward is not None:
            return self._check_backward(grad, *args)
        if self.linear:
            return self.check(grad, *args)
        self.check(*args)
        checks.like(self.name, "a gradient", grad, args[0], self.output_size(*args))

    def run_reference(self, *args: Any) -> Any:
        self.check(*args)
        result, layout = self.reference(*args), memory_format(first_map(args[0]))
        y, *others = result if self.variant_of else (result,)
        # What is contiguous may have any stride where its size is 1.
        y = y.clone(memory_format=layout) if 1 in y.shape[1:] else y.contiguous(memory_format=layout)
        return (y, *others) if self.variant_of else y
