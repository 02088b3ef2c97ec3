"""What the shared tests have in common: the cases, and what is right.

The tests know no operation by name: they take the records of convblocks/opinfo.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from convblocks import backends
from convblocks.accuracy import Judge
from convblocks.opinfo import LAYOUTS, OPS, OpInfo, Sample
from tests.conftest import BACKENDS, EMULATED, INTERPRETED

T = TypeVar("T")


class Losing(saved_tensors_hooks):
    """Of what autograd saves, all but the inputs comes back as ``replace`` makes it; ``count`` says how many."""

    def __init__(self, inputs: Iterable[Tensor], replace: Callable[[Tensor], Tensor]) -> None:
        known, self.count = {t.data_ptr() for t in inputs}, 0

        def unpack(t: Tensor) -> Tensor:
            if t.data_ptr() in known:
                return t
            self.count += 1
            return replace(t)

        super().__init__(lambda t: t, unpack)


# Where each kernel takes a thousand times as long as on its own hardware.
SLOW = INTERPRETED or EMULATED is not None
once = pytest.mark.skipif(SLOW, reason="tested with the other backends; nothing differs here")

# Not of the reference, which is what kernels are measured by, and whose derivatives are torch's.
of_kernels = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"], indirect=True)

each_op = pytest.mark.parametrize("info", OPS.values(), ids=OPS.keys())


def _options(every: bool, layouts: Sequence[str] = (), share: int = 1) -> list[Any]:
    """All options of each operation; not ``every`` one where kernels are interpreted or emulated, but the first and the
    last, the rest being slow. With ``layouts``, each option in one of ``share`` of them, which change from one option
    to the next."""
    return [
        pytest.param(
            info,
            o,
            *layout,
            id="-".join((info.name, *(f"{k}_{v}" for k, v in o.items()), *layout)),
            marks=() if every or not SLOW or i in (0, len(info.options) - 1) else pytest.mark.slow,
        )
        for info in OPS.values()
        for i, o in enumerate(info.options)
        for layout in ([(name,) for name in layouts[i % share :: share]] if layouts else [()])
    ]


every_option = pytest.mark.parametrize(("info", "options"), _options(every=True))
each_option = pytest.mark.parametrize(("info", "options"), _options(every=False))
each_layout = pytest.mark.parametrize(
    ("info", "options", "layout"),
    _options(False, ["channels_last_slice", "crop"] if SLOW else list(LAYOUTS), share=1 if SLOW else 3),
)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def dtype_pairs(info: OpInfo) -> list[tuple[torch.dtype, torch.dtype]]:
    """The dtypes of (feature map, parameters): equal, or float32 parameters of a half-precision map."""
    pairs = [(d, d) for d in info.dtypes]
    if info.sample(info.sizes[0]).parameters():
        pairs += [(d, torch.float32) for d in info.dtypes if d.itemsize == 2]
    return pairs


def affordable(cases: Sequence[T], count: int, key: str = "") -> list[T]:
    """All cases, or ``count`` random ones (fixed by ``key``) where kernels are interpreted or emulated."""
    return random.Random(key).sample(list(cases), count) if SLOW and count < len(cases) else list(cases)


def places(info: OpInfo) -> list[tuple[tuple[int, int, int, int], str, str]]:
    """Each (size, layout) of the operation, with a layout for the gradient that differs from case to case."""
    order = list(LAYOUTS)
    pairs = itertools.product(info.sizes, LAYOUTS)
    return [(size, layout, order[i % (len(order) + 1) % len(order)]) for i, (size, layout) in enumerate(pairs)]


def random_like(x: Tensor, layout: str = "contiguous", seed: int = 1) -> Tensor:
    """A gradient for x."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device=x.device, dtype=x.dtype)
    return LAYOUTS[layout](values)


def with_grad(sample: Sample) -> Sample:
    """The same call on new leaves that require a gradient; strides stay as they are."""
    return sample.map(lambda t: t.detach().requires_grad_())


def as_function(op: Callable[..., Tensor], sample: Sample) -> Callable[..., Tensor]:
    """The call as a function of its tensors alone."""

    def function(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        call = sample.map(lambda _: next(given))
        return op(*call.args, **call.kwargs)

    return function


def operands(info: OpInfo, sample: Sample) -> tuple[Any, ...]:
    """The arguments as torch.ops.convblocks takes them: all, in the order of the signature."""
    call = inspect.signature(info.op).bind(*sample.args, **sample.kwargs)
    call.apply_defaults()
    return backends.operators[info.name].arguments(*call.arguments.values())


def backward_operands(info: OpInfo, sample: Sample, grad: Tensor) -> tuple[Any, ...]:
    """Those of the backward operator."""
    args = operands(info, sample)
    if info.maps is not None:
        return (grad, [t.shape[1] for t in sample.maps], *args[1:])
    return (grad, *(args[1:] if info.linear else args))


def operator(info: OpInfo, backward: bool = False) -> Any:
    return getattr(torch.ops.convblocks, info.name + ("_backward" if backward else "")).default


def accuracy(info: OpInfo, sample: Sample, results: Sequence[Tensor], grad: Tensor) -> list[str]:
    """What is wrong with ``results``. The exact ones are the CPU's: devices differ in what they make of NaN."""
    return Judge(info, sample, grad, "cpu").complaints(results)
