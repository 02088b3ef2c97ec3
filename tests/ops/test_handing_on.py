"""Operations that hand their map on: the same gradients, in memory that is there already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from convblocks import backends
from tests.ops.common import Losing, once

pytestmark = [once, pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")]

SIZES = [(2, 5, 3, 4), (1, 1, 7, 7), (3, 70, 9, 11), (2, 33, 1, 1), (1, 16, 40, 30)]
NAMES = ["channel_pool", "channel_attention"]


def _arguments(name: str, x: Tensor) -> tuple[Any, ...]:
    n, c = x.shape[:2]

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=x.dtype).requires_grad_()

    if name == "channel_pool":
        return (random(n, c, 1, 1),)
    return random(4, c), random(4), random(c, 4), None, "relu", "sigmoid"


def _gradients(
    name: str, x: Tensor, args: tuple[Any, ...], seed: Tensor, more: Tensor, hand_on: bool, held: bool = False
) -> tuple[Tensor, ...]:
    """Those of x and the other tensors where the gradient of another reader of x is ``more``: held here, or a copy."""
    packet = getattr(torch.ops.convblocks, f"_{name}_handing_on" if hand_on else name)
    x = x.detach().requires_grad_()
    y, handed = packet(x, *args) if hand_on else (packet(x, *args), x)
    tensors = [x, *(t for t in args if isinstance(t, Tensor))]
    if held:
        return torch.autograd.grad([y, handed], tensors, [seed, more])
    return torch.autograd.grad([y, (handed * more).sum()], tensors, [seed, torch.ones((), dtype=x.dtype)])


@pytest.mark.parametrize("held", [False, True], ids=["alone", "held"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_parity_of_gradients(name: str, dtype: torch.dtype, layout: torch.memory_format, held: bool) -> None:
    """The same as autograd adds up; and what somebody holds is not written over."""
    for size in SIZES:
        x = torch.randn(size).round(decimals=1).to(dtype)  # some have the maximum in common
        x = x.contiguous(memory_format=layout)
        args, more = _arguments(name, x), torch.randn(size, dtype=dtype).contiguous(memory_format=layout)
        before, seed = more.clone(), torch.randn_like(getattr(torch.ops.convblocks, name)(x, *args))
        expected = _gradients(name, x, args, seed, more, hand_on=False)
        results = _gradients(name, x, args, seed, more, hand_on=True, held=held)
        bounds = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, **bounds)
        assert results[0].stride() == expected[0].stride()
        assert torch.equal(more, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["other layout", "slice", "expanded", "not finite"])
def test_parity_with_any_gradient(name: str, kind: str) -> None:
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    args = _arguments(name, x)
    more = {
        "other layout": torch.randn_like(x).contiguous(memory_format=torch.channels_last),
        "slice": torch.randn(2, 9, 5, 4, dtype=x.dtype)[:, 2:8],
        "expanded": torch.randn(2, 6, 1, 1, dtype=x.dtype).expand(x.shape),
        "not finite": torch.full_like(x, float("inf")),
    }[kind]
    seed, before = torch.randn_like(getattr(torch.ops.convblocks, name)(x, *args)), more.clone()
    expected = _gradients(name, x, args, seed, more, hand_on=False)
    for held in (False, True):
        for a, b in zip(_gradients(name, x, args, seed, more, True, held), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(more, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NAMES)
def test_parity_where_what_is_kept_is_lost(name: str, layout: torch.memory_format) -> None:
    x = torch.randn(3, 70, 9, 11).round(decimals=1).contiguous(memory_format=layout)
    args, more = _arguments(name, x), torch.randn_like(x)
    seed = torch.randn_like(getattr(torch.ops.convblocks, name)(x, *args))
    expected = _gradients(name, x, args, seed, more, hand_on=True)
    inputs = [x, more, *(t for t in args if isinstance(t, Tensor))]
    losing = Losing(inputs, lambda t: t.new_empty(0))
    with losing:
        results = _gradients(name, x, args, seed, more, hand_on=True)
    assert losing.count == 1
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_take_no_memory(name: str, layout: torch.memory_format) -> None:
    """That of the map lies where the one before it lay, unless somebody holds that."""
    x = torch.randn(2, 64, 24, 24).contiguous(memory_format=layout)
    args, more = _arguments(name, x), torch.randn_like(x)
    seed, most = torch.randn_like(getattr(torch.ops.convblocks, name)(x, *args)), {}
    for held in (False, True):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            _gradients(name, x, args, seed, more, hand_on=True, held=held)
        used = [event.self_cpu_memory_usage for event in record.events()]
        most[held] = sum(bytes >= x.nbytes for bytes in used)
    # The product with `more` in the forward, and its gradient; the sum of both gradients and our own.
    assert most == {False: 2, True: 2}


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str) -> None:
    """Of either output and of both; twice, and of a graph that is kept."""
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    args = _arguments(name, x)
    tensors = [x, *(t for t in args if isinstance(t, Tensor))]
    packet = getattr(torch.ops.convblocks, f"_{name}_handing_on")

    def both(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given)
        y, handed = packet(x, *(next(rest) if isinstance(a, Tensor) else a for a in args))
        return y, handed.sin()

    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradgradcheck(both, tensors)
    y, handed = packet(x, *args)
    assert torch.equal(torch.autograd.grad(handed.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    alone = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(alone, torch.autograd.grad(getattr(torch.ops.convblocks, name)(x, *args).sum(), x)[0])
    total = y.sum() + handed.pow(2).sum()
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    second = torch.autograd.grad(total, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_and_under_transforms(name: str) -> None:
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in _arguments(name, x))
    packet, plain = getattr(torch.ops.convblocks, f"_{name}_handing_on"), getattr(torch.ops.convblocks, name)
    y, handed = packet(x, *args)
    assert torch.equal(y, plain(x, *args))
    assert torch.equal(handed, x)

    def total(x: Tensor) -> Tensor:
        y, handed = packet(x, *args)
        return y.sum() + handed.pow(2).sum()

    expected = torch.func.grad(lambda x: plain(x, *args).sum() + x.pow(2).sum())(x)
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    _, tangent = torch.func.jvp(total, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected.sum())


@pytest.mark.parametrize("view", ["negative", "strided"])
@pytest.mark.parametrize("name", NAMES)
def test_parity_of_views(name: str, view: str) -> None:
    base = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    x = {"negative": torch._neg_view(base), "strided": base[:, :, :, ::2]}[view]
    args, more = _arguments(name, x), torch.randn(x.shape, dtype=x.dtype)
    seed = torch.randn_like(getattr(torch.ops.convblocks, name)(x, *args))
    expected = _gradients(name, x, args, seed, more, hand_on=False)
    for a, b in zip(_gradients(name, x, args, seed, more, hand_on=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", ["smaller", "larger", "half"])
@pytest.mark.parametrize("name", NAMES)
def test_what_hooks_put_in_its_place(name: str, other: str) -> None:
    """Of what was saved for the backward is checked again: no kernel reads past it."""
    x = torch.randn(2, 6, 5, 4)
    args = _arguments(name, x)
    changes: dict[str, Any] = {
        "smaller": lambda t: t[:1, :1],
        "larger": lambda t: t.repeat(3, 3, *[1] * (t.dim() - 2)),
        "half": lambda t: t.to(torch.float64),
    }

    def change(t: Tensor) -> Tensor:
        return changes[other](t) if t.dim() > 1 and t.shape != x.shape else t

    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, change),
        pytest.raises((ValueError, TypeError), match=name),
    ):
        _gradients(
            name, x, args, torch.ones_like(getattr(torch.ops.convblocks, name)(x, *args)), x.clone(), hand_on=True
        )
