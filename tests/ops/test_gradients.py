"""Derivatives of first and second order, what the backward is given and what is kept for it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

from convblocks.accuracy import run
from convblocks.opinfo import LAYOUTS, OPS, OpInfo, Options, Sample
from tests.ops.common import (
    SLOW,
    Losing,
    accuracy,
    affordable,
    as_function,
    both_layouts,
    each_op,
    each_option,
    of_kernels,
    once,
    operator,
    with_grad,
)


@pytest.mark.parametrize("layout", affordable(["contiguous", "channels_last", "channel_slice"], 1))
@of_kernels
@each_option
def test_gradcheck(info: OpInfo, options: Options, layout: str, backend: str, device: str) -> None:
    """Numeric against analytic, in reverse and forward mode; also batched gradients."""
    sample = with_grad(info.sample((2, 3, 2, 3), options, dtype=torch.float64, layout=layout, device=device))
    function = as_function(info.op, sample)
    assert gradcheck(
        function, sample.tensors(), check_forward_ad=True, check_batched_grad=True, fast_mode=SLOW, atol=1e-6
    )


@once
@both_layouts
@of_kernels
@each_option
def test_gradgradcheck(info: OpInfo, options: Options, layout: str, backend: str, device: str) -> None:
    """The second derivative is that of a formula, on every backend."""
    sample = with_grad(info.sample((2, 3, 2, 2), options, dtype=torch.float64, layout=layout, device=device))
    function = as_function(info.op, sample)
    assert gradgradcheck(function, sample.tensors(), check_fwd_over_rev=True, atol=1e-6)


@both_layouts
@each_op
def test_gradient_of_a_sum(info: OpInfo, layout: str, backend: str, device: str) -> None:
    """``y.sum().backward()`` gives a gradient of one stored element: all its strides are 0."""
    sample = with_grad(info.sample((2, 8, 7, 7), layout=layout, device=device))
    y = info.op(*sample.args, **sample.kwargs)
    y.sum().backward()
    gradients = [t.grad for t in sample.tensors() if t.grad is not None]
    wrong = accuracy(info, sample, [y.detach(), *gradients], torch.ones_like(y))
    assert not wrong, "\n".join(wrong)


def _in_order(values: Tensor, order: tuple[int, ...], padding: int) -> Tensor:
    """The values with their dimensions in this order in memory, the innermost one a slice of a longer one."""
    stored = torch.nn.functional.pad(values.permute(order), (0, padding)).contiguous()
    return stored[..., : stored.shape[-1] - padding].permute([order.index(i) for i in range(4)])


@pytest.mark.parametrize(
    "size", affordable([(2, 3, 4, 5), (1, 4, 3, 3), (2, 1, 3, 4), (2, 4, 1, 5), (2, 4, 5, 1)], 1), ids=str
)
@each_op
def test_every_order_of_strides(info: OpInfo, size: tuple[int, int, int, int], backend: str, device: str) -> None:
    """Of the map and of the gradient, dense and as slices: the same numbers as from contiguous ones."""
    plain = info.sample(size, dtype=torch.float64, device=device)
    gradient = info.gradient(plain)
    expected = run(info.reference, plain, gradient)
    orders = list(itertools.product(itertools.permutations(range(4)), repeat=2))
    wrong = []
    for i, (order, grad_order) in enumerate(affordable(orders, 20, info.name)):
        ordered = plain.map_maps(functools.partial(_in_order, order=order, padding=i % 3 % 2))
        results = run(info.op, ordered, _in_order(gradient, grad_order, i % 3 // 2))
        if not all(torch.allclose(a, b) for a, b in zip(results, expected, strict=True)):
            wrong.append((order, grad_order))
    assert not wrong


@each_op
def test_one_channels_last_sample_stays_so(info: OpInfo, backend: str, device: str) -> None:
    """Whatever its batch stride is, which no sample has a use for: an image as (H, W, C) in memory."""
    sample = info.sample((1, 8, 6, 5), device=device)
    sample = sample.map_maps(lambda t: t[0].permute(1, 2, 0).contiguous().permute(2, 0, 1).unsqueeze(0))
    y = info.op(*sample.args, **sample.kwargs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous() or y.shape[2:] == (1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_op
def test_gradient_in_any_layout(info: OpInfo, layout: str, backend: str, device: str) -> None:
    """The layout of the incoming gradient changes nothing, whatever that of the map is."""
    for map_layout in affordable(("contiguous", "channels_last", "crop"), 1, layout):
        sample = with_grad(info.sample((2, 8, 5, 6), layout=map_layout, device=device))
        grad = info.gradient(sample, layout)
        wrong = accuracy(info, sample, run(info.op, sample, grad), grad)
        assert not wrong, "\n".join([map_layout, *wrong])


@each_option
def test_each_argument_alone(info: OpInfo, options: Options, backend: str, device: str) -> None:
    """An argument that requires no gradient gets none, and the others get the same as before."""
    sample = info.sample((2, 8, 5, 6), options, device=device)
    grad = info.gradient(sample)
    expected = run(info.op, with_grad(sample), grad)[1:]
    for i in range(len(expected)):
        for wanted in ({i}, set(range(len(expected))) - {i}):
            tensors = [t.detach().clone().requires_grad_(j in wanted) for j, t in enumerate(sample.tensors())]
            if not wanted:
                continue
            as_function(info.op, sample)(*tensors).backward(grad)
            for j, t in enumerate(tensors):
                if j in wanted:
                    assert t.grad is not None
                    torch.testing.assert_close(t.grad, expected[j], rtol=0, atol=0)
                else:
                    assert t.grad is None


@each_op
def test_backward_twice(info: OpInfo, backend: str, device: str) -> None:
    sample = with_grad(info.sample((2, 8, 5, 6), device=device))
    y = info.op(*sample.args, **sample.kwargs)
    grad = info.gradient(sample)
    first = torch.autograd.grad(y, sample.tensors(), grad, retain_graph=True)
    second = torch.autograd.grad(y, sample.tensors(), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_op
@both_layouts
def test_output_where_a_gradient_is_wanted(info: OpInfo, layout: str, backend: str, device: str) -> None:
    """The same as where none is, though a kernel may keep more then."""
    sample = info.sample((3, 18, 10, 9), layout=layout, device=device)
    y = info.op(*sample.args, **sample.kwargs)
    sample = with_grad(sample)
    assert torch.equal(info.op(*sample.args, **sample.kwargs), y)


@each_option
def test_only_inputs_are_saved(info: OpInfo, options: Options, dispatched: str, device: str) -> None:
    if dispatched == "reference":
        pytest.skip("plain torch saves its intermediates")
    sample = with_grad(info.sample((2, 8, 5, 6), options, device=device))
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        info.op(*sample.args, **sample.kwargs)
    kept = [] if info.linear else sample.tensors()
    inputs, memory = saved[: len(kept)], saved[len(kept) :]
    assert {t.data_ptr() for t in inputs} == {t.data_ptr() for t in kept}
    numbers = sum(t.numel() for t in memory)
    assert numbers == info.memory(sample) or (numbers == 0 and dispatched != "cpu")


class _Mode(TorchDispatchMode):
    """Calls what it is asked for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@once
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@both_layouts
@pytest.mark.parametrize("without", ["forgotten", "of another kind", "under a mode"])
@pytest.mark.parametrize(
    ("info", "options"),
    [(info, o) for info in OPS.values() for o in info.options if info.memory(info.sample((2, 8, 5, 6), o))],
)
def test_gradients_without_the_memory(
    info: OpInfo, options: Options, without: str, layout: str, backend: str, device: str
) -> None:
    """What a kernel keeps besides the inputs its backward computes again where it is not there, or not as it was."""
    sample = with_grad(info.sample((3, 18, 40, 41), options, layout=layout, device=device))
    grad = info.gradient(sample)
    losing = Losing(sample.tensors(), lambda t: t.double() if without == "of another kind" else t.new_empty(0))
    with _Mode() if without == "under a mode" else losing:
        y = info.op(*sample.args, **sample.kwargs)
        gradients = torch.autograd.grad(y, sample.tensors(), grad)
    assert losing.count == (without != "under a mode")
    assert not accuracy(info, sample, [y.detach(), *gradients], grad)


@each_op
def test_a_change_of_a_saved_input_is_noticed(info: OpInfo, backend: str, device: str) -> None:
    sample = with_grad(info.sample((2, 8, 5, 6), device=device))
    given = sample.map_maps(lambda t: t * 1)
    y = info.op(*given.args, **given.kwargs)
    given.x.add_(1)
    if info.linear:  # saves none: the change does not matter
        y.sum().backward()
        assert torch.equal(sample.x.grad, torch.ones_like(sample.x))
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("selective", [False, True], ids=["all", "selective"])
@each_op
def test_checkpointing(info: OpInfo, selective: bool, dispatched: str, device: str) -> None:
    sample = with_grad(info.sample((2, 8, 5, 6), device=device))
    calls = 0

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        nonlocal calls
        if op is operator(info):
            calls += 1
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def layer(*tensors: Tensor) -> Tensor:
        return as_function(info.op, sample)(*tensors).square()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    chosen: dict[str, Any] = {"context_fn": contexts} if selective else {}
    y = checkpoint(layer, *sample.tensors(), use_reentrant=False, **chosen)
    gradients = torch.autograd.grad(y.sum(), sample.tensors())
    expected = torch.autograd.grad(layer(*sample.tensors()).sum(), sample.tensors())
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    if selective and dispatched != "reference":
        assert calls > 0, "the policy was not asked about the operator"


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("around", ["forward", "backward"])
@each_op
def test_checkpointing_under_a_mode_half_the_time(
    info: OpInfo, around: str, early_stop: bool, dispatched: str, device: str
) -> None:
    sample = with_grad(info.sample((2, 8, 5, 6), device=device))

    def layer(*tensors: Tensor) -> Tensor:
        return as_function(info.op, sample)(*tensors).square()

    def mode(wanted: bool) -> contextlib.AbstractContextManager[Any]:
        return FlopCounterMode(display=False) if wanted else contextlib.nullcontext()

    with set_checkpoint_early_stop(early_stop):
        with mode(around == "forward"):
            y = checkpoint(layer, *sample.tensors(), use_reentrant=False)
        with mode(around == "backward"):
            gradients = torch.autograd.grad(y.sum(), sample.tensors())
    expected = torch.autograd.grad(layer(*sample.tensors()).sum(), sample.tensors())
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@once
@each_option
def test_parameters_that_are_two_tensors(info: OpInfo, options: Options, dispatched: str, device: str) -> None:
    """A subclass that computes twice with one map: what a kernel keeps of the one is not taken for the other."""
    sample = info.sample((2, 8, 6, 6), options, dtype=torch.float64, device=device)
    maps = {t.data_ptr() for t in sample.maps}
    other = sample.map(lambda t: t if t.data_ptr() in maps else t * 3 + 0.5)

    def gradients(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        tensors = [t.detach().requires_grad_() for t in tensors]
        y = as_function(info.op, sample)(*tensors)
        return torch.autograd.grad(y.sum(), tensors)

    pairs = list(zip(sample.tensors(), other.tensors(), strict=True))
    both = gradients([a if a.data_ptr() in maps else TwoTensor(a, b.clone()) for a, b in pairs])
    for half, half_sample in (("a", sample), ("b", other)):
        expected = gradients(half_sample.tensors())
        for got, exact in zip(both, expected, strict=True):
            torch.testing.assert_close(getattr(got, half) if isinstance(got, TwoTensor) else exact, exact)


@each_op
def test_no_gradient_no_graph(info: OpInfo, backend: str, device: str) -> None:
    sample = info.sample((2, 8, 5, 6), device=device)
    assert not info.op(*sample.args, **sample.kwargs).requires_grad
    wanted = with_grad(sample)
    with torch.no_grad():
        assert not info.op(*wanted.args, **wanted.kwargs).requires_grad
    with torch.inference_mode():
        y = info.op(*Sample(sample.args, sample.kwargs).args, **sample.kwargs)
    torch.testing.assert_close(y, info.op(*sample.args, **sample.kwargs), rtol=0, atol=0)
