"""The operator as torch sees it: schema, meta kernel, memory; and that a run is repeatable and touches nothing else."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from convblocks import backends
from convblocks.accuracy import run
from convblocks.opinfo import LAYOUTS, OpInfo, Options, Sample
from convblocks.ops.operator import memory_format
from tests.ops.common import (
    SLOW,
    affordable,
    as_function,
    backward_operands,
    each_layout,
    each_op,
    each_option,
    of_kernels,
    operands,
    operator,
    places,
    with_grad,
)


@pytest.fixture
def compiled(dispatched: str) -> str:
    """The backend, where a backward operator exists: with the compiled part."""
    if backends.extension_error is not None:
        pytest.skip(f"no backward operator: {backends.extension_error}")
    return dispatched


def _to_meta(a: Any) -> Any:
    if isinstance(a, list):
        return list(map(_to_meta, a))
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a


SHAPES = {**dict.fromkeys(LAYOUTS, (2, 5, 4, 3)), "no samples": (0, 5, 4, 3), "no pixels": (2, 5, 0, 3)}


def _case(info: OpInfo, shape: str, device: str) -> Sample:
    """Each shape or layout with another one of the options."""
    options = info.options[list(SHAPES).index(shape) % len(info.options)]
    if shape == "no pixels":
        accepted = (o for o in info.options if _is_accepted(info, info.sample(SHAPES[shape], o)))
        options = next(accepted, info.options[0])
    layout = shape if shape in LAYOUTS else "contiguous"
    return info.sample(SHAPES[shape], options, layout=layout, device=device)


def _is_accepted(info: OpInfo, sample: Sample) -> bool:
    try:
        info.output(sample)
    except RuntimeError:
        return False
    return True


# The dispatcher is the same whatever runs the kernels.
each_shape = pytest.mark.parametrize("shape", ["channels_last", "crop", "no samples"] if SLOW else list(SHAPES))


@each_shape
@each_op
def test_opcheck(info: OpInfo, shape: str, dispatched: str, device: str) -> None:
    sample = _case(info, shape, device)
    if not _is_accepted(info, sample):
        with pytest.raises(ValueError, match=f"^{info.name}: expected "):
            operator(info)(*operands(info, sample))
        return
    if shape != "no pixels":  # there the gradients are NaN, which opcheck holds to be wrong
        sample = with_grad(sample)
    opcheck(operator(info), operands(info, sample))


@each_shape
@each_op
def test_opcheck_backward(info: OpInfo, shape: str, compiled: str, device: str) -> None:
    sample = with_grad(_case(info, shape, device))
    if not _is_accepted(info, sample):
        grad = torch.empty_like(sample.x)
        with pytest.raises(ValueError, match=f"^{info.name}: expected "):
            operator(info, backward=True)(*backward_operands(info, sample, grad))
        return
    grad = info.gradient(sample, "channels_last").requires_grad_()
    fast = ("test_schema", "test_autograd_registration", "test_faketensor")
    traced = shape in ("contiguous", "channels_last_slice", "no samples") and not SLOW  # the second derivative
    traced = traced and not info.by_torch  # torch cannot trace that of its dense convolution
    utils = (*fast, "test_aot_dispatch_dynamic") if traced else fast
    opcheck(operator(info, backward=True), backward_operands(info, sample, grad), test_utils=utils)


@each_layout
def test_memory_format(info: OpInfo, options: Options, layout: str, backend: str, device: str) -> None:
    """The output and the gradient of the map are dense, in the memory format of the map."""
    for size in affordable(info.sizes, 1, f"{options}{layout}"):
        sample = with_grad(info.sample(size, options, layout=layout, device=device))
        grad = info.gradient(sample)
        y, *gradients = run(info.op, sample, grad)
        expected = torch.empty(y.shape, device="meta", memory_format=memory_format(sample.x)).stride()
        assert y.stride() == expected
        assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in sample.tensors()}
        if size[2] * size[3] > 1 and backend != "reference":
            grad_format = memory_format(grad if info.linear else sample.x)
            assert all(g.is_contiguous(memory_format=grad_format) for g in gradients[: len(sample.maps)])


@each_layout
def test_meta_agrees(info: OpInfo, options: Options, layout: str, compiled: str, device: str) -> None:
    """Size, stride and dtype, forward and backward."""
    for size in affordable(info.sizes, 1, f"{options}{layout}"):
        sample = info.sample(size, options, dtype=torch.bfloat16, layout=layout, device=device)
        args, grad = operands(info, sample), info.gradient(sample, "channels_last")
        pairs = (operator(info), args), (operator(info, backward=True), backward_operands(info, sample, grad))
        for op, real in pairs:
            result, meta = op(*real), op(*map(_to_meta, real))
            pairs = zip(result, meta, strict=True) if isinstance(result, (tuple, list)) else [(result, meta)]
            for r, m in pairs:
                assert (m.device.type, m.shape, m.stride(), m.dtype) == ("meta", r.shape, r.stride(), r.dtype)


@of_kernels
@each_option
def test_every_output_is_written(info: OpInfo, options: Options, backend: str, device: str) -> None:
    """torch fills new memory with NaN in deterministic mode: none may be left, nor leak from scratch memory."""
    cases = affordable(places(info), 2, f"{options}")
    for size, layout, grad_layout in cases if SLOW else cases[info.options.index(options) % 2 :: 2]:
        sample = with_grad(info.sample(size, options, layout=layout, device=device))
        grad = info.gradient(sample, grad_layout)
        expected = run(info.op, sample, grad)
        torch.use_deterministic_algorithms(True)
        poisoned = run(info.op, sample, grad)
        torch.use_deterministic_algorithms(False)
        for p, e in zip(poisoned, expected, strict=True):
            torch.testing.assert_close(p, e, rtol=0, atol=0, equal_nan=True)


@of_kernels
@each_op
def test_a_single_pixel_is_repeatable(info: OpInfo, backend: str, device: str) -> None:
    """torch's own gradient of a convolution of one is not."""
    sample = with_grad(info.sample((1, 8 if SLOW else 70, 1, 1), device=device))
    grad = info.gradient(sample)
    first = run(info.op, sample, grad)
    for _ in range(8):
        for again, before in zip(run(info.op, sample, grad), first, strict=True):
            torch.testing.assert_close(again, before, rtol=0, atol=0, equal_nan=True)


@each_option
def test_repeatable(info: OpInfo, options: Options, backend: str, device: str) -> None:
    """Bit for bit from run to run, and whatever the number of threads."""
    for size in [(2, 5, 6, 7)] if SLOW else [(4, 64, 28, 28), (2, 3, 65, 61), (8, 70, 1, 3)]:
        for layout in ("contiguous", "channels_last"):
            sample = with_grad(info.sample(size, options, layout=layout, device=device))
            grad = info.gradient(sample)
            first = run(info.op, sample, grad)
            for threads in (torch.get_num_threads(), 1, 2, 3):
                if (backend == "reference" or info.by_torch) and threads != torch.get_num_threads():
                    continue  # torch promises nothing there
                torch.set_num_threads(threads)
                again = run(info.op, sample, grad)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (size, layout, threads)


@each_layout
def test_inputs_stay_as_they_were(info: OpInfo, options: Options, layout: str, backend: str, device: str) -> None:
    sample = with_grad(info.sample((2, 8, 5, 3), options, layout=layout, device=device))
    given = [*sample.tensors(), info.gradient(sample, layout)]
    copies, versions = [t.detach().clone() for t in given], [t._version for t in given]
    run(info.op, sample, given[-1])
    assert all(torch.equal(t, c) for t, c in zip(given, copies, strict=True))
    assert versions == [t._version for t in given]


@each_op
def test_lazily_negated_and_zero_tensors(info: OpInfo, backend: str, device: str) -> None:
    """torch marks some tensors as negated, or as all zeros, without storing that."""
    sample = info.sample((2, 8, 5, 3), device=device)
    function = as_function(info.op, sample)
    for lazy in (torch._neg_view(sample.x), torch._efficientzerotensor(sample.x.shape, device=device)):
        stored = lazy.clone() if lazy.is_neg() else torch.zeros_like(sample.x)
        torch.testing.assert_close(function(lazy, *sample.tensors()[1:]), function(stored, *sample.tensors()[1:]))


@each_op
def test_many_python_threads(info: OpInfo, backend: str, device: str) -> None:
    if backend not in ("reference", "cpu"):
        pytest.skip("interpreter and emulator run one kernel at a time")
    samples = [with_grad(info.sample((2, 16, 28, 20), device=device, seed=seed)) for seed in range(8)]
    expected = [run(info.op, s, info.gradient(s)) for s in samples]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got, want in zip(
            pool.map(lambda s: run(info.op, s, info.gradient(s)), samples * 4), expected * 4, strict=True
        ):
            torch.testing.assert_close(got, want)
