"""Outputs and gradients against the reference in float64: at most twice the error that torch makes in that dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convblocks.accuracy import Judge, run
from convblocks.opinfo import OpInfo, Options, Sample
from tests.conftest import INTERPRETED
from tests.ops.common import (
    SLOW,
    accuracy,
    affordable,
    both_layouts,
    dtype_pairs,
    each_op,
    each_option,
    every_option,
    of_kernels,
    once,
    places,
    with_grad,
)

PAIRS = [(d, d) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
PAIRS += [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


def assert_accurate(info: OpInfo, sample: Sample, grad: Tensor) -> None:
    wrong = accuracy(info, sample, run(info.op, sample, grad), grad)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), PAIRS, ids=lambda d: str(d).removeprefix("torch."))
@every_option
@pytest.mark.parametrize(
    "count", [1 if INTERPRETED else 2, pytest.param(10**9, marks=pytest.mark.slow)] if SLOW else [10**9]
)
def test_sizes_and_layouts(
    info: OpInfo,
    options: Options,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    count: int,
    backend: str,
    device: str,
) -> None:
    """Every size in every layout in float32 with the first option, half of them with each other; in other dtypes, of
    which the code differs less, one in four; of the reference, which is what it is measured by, one in eight. Which
    ones changes from option to option. ``count`` of them where the backend is interpreted or emulated."""
    if (dtype, parameter_dtype) not in dtype_pairs(info):
        pytest.skip("has no parameters")
    wrong = []
    cases = affordable(places(info), count, f"{options}{dtype}{parameter_dtype}")
    number = info.options.index(options)
    every = 8 if backend == "reference" else 1 if SLOW else 4 if dtype != torch.float32 else 2 if number else 1
    for size, layout, grad_layout in cases[number % every :: every]:
        sample = with_grad(
            info.sample(size, options, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout, device=device)
        )
        grad = info.gradient(sample, grad_layout)
        results = run(info.op, sample, grad)
        assert [r.dtype for r in results] == [dtype, *(t.dtype for t in sample.tensors())]
        wrong += [f"{size} {layout} gradient {grad_layout}: {w}" for w in accuracy(info, sample, results, grad)]
    assert not wrong, "\n".join(wrong)


@both_layouts
@each_op
def test_more_than_one_thread_has_work(info: OpInfo, layout: str, backend: str, device: str) -> None:
    size = (1, 16, 20, 20) if SLOW else (4, 64, 28, 28)
    sample = with_grad(info.sample(size, layout=layout, device=device))
    assert_accurate(info, sample, info.gradient(sample))


@once
def test_stores_past_the_caches() -> None:
    """As if no map found room in them: kernels write such maps in another way."""
    others = [os.path.join(os.path.dirname(__file__), f"test_{name}.py") for name in ("operator", "scale_shift_act")]
    sizes = "test_sizes_and_layouts and (float32-float32 or bfloat16-bfloat16)"
    which = f"cpu and ({sizes} or test_repeatable or test_short_planes)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *others, "-k", which]
    environment = {**os.environ, "CONVBLOCKS_CACHE_BYTES": "0", "CONVBLOCKS_TEST_BACKENDS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@each_option
def test_strided_parameters(info: OpInfo, options: Options, backend: str, device: str) -> None:
    sample = info.sample((2, 8, 5, 3), options, device=device)
    parameters = [torch.stack((t, t), -1)[..., 0] if isinstance(t, Tensor) else t for t in sample.args[1:]]
    sample = with_grad(Sample((sample.args[0], *parameters), sample.kwargs))
    assert_accurate(info, sample, info.gradient(sample))


def _one(value: float) -> Callable[[Tensor], Tensor]:
    def place(x: Tensor) -> Tensor:
        where = (0, x.shape[1] // 2, 2, 3)
        return x.index_put(tuple(torch.tensor([i], device=x.device) for i in where), x.new_tensor(value))

    return place


@of_kernels
@pytest.mark.parametrize("dtype", affordable([torch.float32, torch.bfloat16], 1), ids=str)
@both_layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@each_option
def test_not_finite(
    info: OpInfo,
    options: Options,
    value: float,
    layout: str,
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    """One NaN or Inf in a map: they reach just the outputs and gradients that they reach in the reference."""
    sample = info.sample((2, 9, 8, 5), options, dtype=dtype, layout=layout, device=device)
    sample = with_grad(sample.map_maps(_one(value)))
    grad = info.gradient(sample)
    may_be_nan = value != value or len(sample.maps) > 1  # as Inf - Inf is
    if may_be_nan and _torch_contradicts_itself(info, sample, grad):
        with torch.no_grad():
            wrong = Judge(info, sample, None, "cpu").complaints(run(info.op, sample))
        assert not wrong, "\n".join(wrong)
        return
    assert_accurate(info, sample, grad)


def _torch_contradicts_itself(info: OpInfo, sample: Sample, grad: Tensor) -> bool:
    """Its vector code and its scalar code differ in some derivatives at NaN (relu6, hardswish)."""

    def exact(format_: torch.memory_format) -> list[Tensor]:
        def place(t: Tensor) -> Tensor:
            return t.double().contiguous(memory_format=format_) if t.dim() == 4 else t.double()

        return run(info.reference, sample.map(place), grad.double())

    both = exact(torch.contiguous_format), exact(torch.channels_last)
    return not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(*both, strict=True))


@both_layouts
@each_option
def test_large_halves(info: OpInfo, options: Options, layout: str, backend: str, device: str) -> None:
    """Values at the end of float16: their sum, or their square, would be Inf in it."""
    if backend == "reference":
        pytest.skip("torch rounds its intermediates to float16, and they are Inf")
    sample = info.sample((2, 8, 9, 5), options, dtype=torch.float16, layout=layout, device=device)
    most = info.largest(options) / (len(sample.maps) if info.maps is None else 1)  # maps may be added up
    for enlarge in (lambda x: x.sign() * most, lambda x: torch.full_like(x, most)):
        large = sample.map_maps(enlarge)
        assert torch.isfinite(info.op(*large.args, **large.kwargs)).all()
        large = with_grad(large)
        assert_accurate(info, large, info.gradient(large) * 1e-3)


@pytest.mark.parametrize("size", [(0, 4, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0), (0, 4, 0, 0)], ids=str)
@both_layouts
@each_option
def test_nothing_to_compute(
    info: OpInfo, options: Options, size: tuple[int, int, int, int], layout: str, backend: str, device: str
) -> None:
    sample = with_grad(info.sample(size, options, layout=layout, device=device))
    try:
        grad = torch.ones_like(info.output(sample), device=device)
        expected = run(info.reference, sample, grad)
    except (RuntimeError, IndexError):  # torch has no maximum of no pixels: nor have we, and say so
        with pytest.raises(ValueError, match=f"^{info.name}: expected "):
            info.op(*sample.args, **sample.kwargs)
        return
    for result, like in zip(run(info.op, sample, grad), expected, strict=True):
        torch.testing.assert_close(result, like, equal_nan=True)


@pytest.mark.parametrize("stride", ["batch", "channel", "pixel"])
@each_op
def test_offsets_beyond_32_bits(info: OpInfo, stride: str, backend: str, device: str) -> None:
    """Few values that lie far apart, in memory of which the rest is never touched."""
    sample = info.sample((2, 3, 1, 3), dtype=torch.bfloat16, device=device)
    far = {"batch": (2**31, 3, 3, 1), "channel": (5, 2**30 + 1, 3, 1), "pixel": (5, 1, 3 * 2**30, 2**30)}[stride]

    def spread(t: Tensor) -> Tensor:
        storage = torch.empty(2**31 + 64, dtype=t.dtype, device=device)
        return storage.as_strided(t.shape, far).copy_(t)

    sample = with_grad(sample.map_maps(spread))
    assert_accurate(info, sample, spread(info.gradient(sample)))


@pytest.mark.slow
@both_layouts
@each_op
def test_more_than_32_bits_of_values(info: OpInfo, layout: str, backend: str, device: str) -> None:
    """An output, and gradients, of more than 2**31 elements (4 GiB each): one map, seen as many."""
    if SLOW:
        pytest.skip("takes hours in an interpreter or emulator")
    if backend == "reference":
        pytest.skip("torch's own business, and its copies do not fit in memory")
    n = 2**31 // (64 * 112 * 112) + 2
    few = info.sample((1, 64, 112, 112), dtype=torch.bfloat16, layout=layout, device=device)
    few = with_grad(few)
    grad = info.gradient(few)
    grad = grad.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else grad
    expected = run(info.op, few, grad)
    many = with_grad(few.map_maps(lambda x: x.detach().expand(n, -1, -1, -1)))
    y = info.op(*many.args, **many.kwargs)
    assert y.numel() > 2**31
    assert all(torch.equal(y[i], expected[0][0]) for i in range(n))
    (grad_x,) = torch.autograd.grad(y, many.x, grad.expand(n, -1, -1, -1))
    assert all(torch.equal(grad_x[i], expected[1][0]) for i in range(n))
