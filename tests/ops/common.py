"""What the shared tests have in common: the cases, a run with gradients, and the rule of accuracy.

The tests know no operation by name: they take the records of convblocks/opinfo.py.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from convblocks.opinfo import LAYOUTS, OPS, OpInfo, Sample
from tests.conftest import EMULATED, INTERPRETED

T = TypeVar("T")

# Where each kernel takes a thousand times as long as on its own hardware.
SLOW = INTERPRETED or EMULATED is not None
once = pytest.mark.skipif(SLOW, reason="tested with the other backends; nothing differs here")

each_op = pytest.mark.parametrize("info", OPS.values(), ids=OPS.keys())
each_option = pytest.mark.parametrize(
    ("info", "options"),
    [
        pytest.param(info, o, id=f"{info.name}-{'-'.join(f'{k}_{v}' for k, v in o.items())}")
        for info in OPS.values()
        for o in info.options
    ],
)
each_layout = pytest.mark.parametrize("layout", ["channels_last_slice", "crop"] if SLOW else list(LAYOUTS))
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def dtype_pairs(info: OpInfo) -> list[tuple[torch.dtype, torch.dtype]]:
    """The dtypes of (feature map, parameters): equal, or float32 parameters of a half-precision map."""
    pairs = [(d, d) for d in info.dtypes]
    if len(info.sample(info.sizes[0]).tensors()) > 1:
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


def in_double(sample: Sample) -> Sample:
    """The same call in float64 on the CPU; what torch makes of NaN is not the same on all devices."""
    return sample.map(lambda t: t.detach().cpu().double().requires_grad_())


def run(op: Callable[..., Tensor], sample: Sample, grad: Tensor | None = None) -> list[Tensor]:
    """The output, then the gradient of each tensor argument."""
    y = op(*sample.args, **sample.kwargs)
    return [y.detach(), *torch.autograd.grad(y, sample.tensors(), torch.ones_like(y) if grad is None else grad)]


def as_function(op: Callable[..., Tensor], sample: Sample) -> Callable[..., Tensor]:
    """The call as a function of its tensors alone."""

    def function(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        args = [next(given) if isinstance(a, Tensor) else a for a in sample.args]
        return op(*args, **sample.kwargs)

    return function


def operands(info: OpInfo, sample: Sample) -> tuple[Any, ...]:
    """The arguments as torch.ops.convblocks takes them: all, in the order of the signature."""
    call = inspect.signature(info.op).bind(*sample.args, **sample.kwargs)
    call.apply_defaults()
    return tuple(call.arguments.values())


def operator(info: OpInfo, backward: bool = False) -> Any:
    return getattr(torch.ops.convblocks, info.name + ("_backward" if backward else "")).default


# --- the rule of accuracy ---------------------------------------------------------------------------------------------


def worst(result: Tensor, exact: Tensor) -> float:
    """The largest error where both are finite."""
    result = result.cpu().double()
    both = result.isfinite() & exact.isfinite()
    return (result - exact)[both].abs().max().item() if both.any() else 0.0


def torch_errors(info: OpInfo, sample: Sample, grad: Tensor, exact: Sequence[Tensor]) -> list[float]:
    """The error of the reference in the dtype of the sample; for float64 that in float32, scaled down."""
    if sample.x.dtype == torch.float64:
        errors = torch_errors(info, sample.map(Tensor.float), grad.float(), exact)
        return [e * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps for e in errors]
    return [worst(t, e) for t, e in zip(run(info.reference, with_grad(sample), grad), exact, strict=True)]


def conditioning(info: OpInfo, sample: Sample, grad: Tensor, exact: Sequence[Tensor]) -> list[float]:
    """How far the exact results move when each input moves by an ulp or so.

    A sum of many terms that nearly cancel, such as the gradient of a bias, is uncertain by that much, however luckily
    torch hits it.
    """
    generator = torch.Generator().manual_seed(0)

    def move(t: Tensor) -> Tensor:
        relative = torch.finfo(t.dtype).eps * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1)
        return t.detach().cpu().double() * (1 + 2 * relative)

    moved = [run(info.reference, with_grad(sample.map(move)), move(grad)) for _ in range(4)]
    return [max(worst(m[i], e) for m in moved) for i, e in enumerate(exact)]


def complaint(result: Tensor, allowed: float, exact: Tensor) -> str | None:
    """Why a result is not accurate, or None."""
    result = result.cpu()
    expected = exact.to(result.dtype)  # Inf where the exact value is too large for the dtype
    special = ~expected.isfinite()
    if not torch.equal(expected[special].nan_to_num(0.125), result[special].nan_to_num(0.125)):
        return f"NaN or Inf differ: expected {expected[special][:4].tolist()}, got {result[special][:4].tolist()}"
    if not result[~special].isfinite().all():
        wrong = (~special & ~result.isfinite()).nonzero()
        return f"{len(wrong)} values are not finite, first at {wrong[0].tolist()}"
    size = exact[~special].abs().max().item() if (~special).any() else 0.0
    allowed += torch.finfo(result.dtype).eps * size  # the rounding of the result, where torch is exact by luck
    error = worst(result, exact)
    return None if error <= allowed else f"error {error:.3g} of values up to {size:.3g}, allowed {allowed:.3g}"


def accuracy(info: OpInfo, sample: Sample, results: Sequence[Tensor], grad: Tensor) -> list[str]:
    """What is wrong with ``results``, the output and gradients of the operation for this sample.

    NaN and Inf must be where they are in the exact result, and the error at most twice that of torch, give or take the
    ulp of an input.
    """
    exact = run(info.reference, in_double(sample), grad.cpu().double())
    allowed = [2 * e for e in torch_errors(info, sample, grad, exact)]
    if any(complaint(*r) for r in zip(results, allowed, exact, strict=True)):
        moves = conditioning(info, sample, grad, exact)
        allowed = [a + m for a, m in zip(allowed, moves, strict=True)]
    names = ["output", *(f"gradient {i}" for i in range(len(results) - 1))]
    found = map(complaint, results, allowed, exact)
    return [f"{name}: {words}" for name, words in zip(names, found, strict=True) if words is not None]
