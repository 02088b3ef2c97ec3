"""The rule of accuracy itself: what it lets pass and what not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convblocks.accuracy import Judge, limit, run
from convblocks.opinfo import OPS, OpInfo, Sample


def operation(plain: float, exact: float) -> OpInfo:
    """Its exact result is one number, and torch's in float32 another."""

    def reference(x: Tensor) -> Tensor:
        return torch.full_like(x, exact if x.dtype == torch.float64 else plain)

    return dataclasses.replace(OPS["simam"], reference=reference)


@pytest.mark.parametrize(
    ("got", "plain", "exact", "passes"),
    [
        (1.0, 1.0, 1.0, True),
        (1.001, 1.0006, 1.0, True),  # less than twice torch's error
        (1.001, 1.0004, 1.0, False),
        (float("nan"), float("nan"), float("nan"), True),
        (float("nan"), 1.0, 1.0, False),
        (1.0, float("nan"), float("nan"), False),
        (float("inf"), float("inf"), float("inf"), True),
        (float("-inf"), float("inf"), float("inf"), False),
    ],
)
def test_one_number(got: float, plain: float, exact: float, passes: bool) -> None:
    judge = Judge(operation(plain, exact), Sample((torch.zeros(1, 1, 1, 1),), {}), None)
    assert (not judge.complaints([torch.full((1, 1, 1, 1), got)])) == passes


def test_float64_is_held_to_float32_scaled_down() -> None:
    plain, exact = torch.tensor([1.0 + 2**-20]), torch.tensor([1.0], dtype=torch.float64)
    assert limit(plain, exact, torch.float64) == 2 * 2**-49 + 2**-52


def test_too_large_for_the_dtype_is_infinite() -> None:
    judge = Judge(operation(1e5, 1e5), Sample((torch.zeros(1, 1, 1, 1, dtype=torch.float16),), {}), None)
    assert not judge.complaints([torch.full((1, 1, 1, 1), torch.inf, dtype=torch.float16)])
    assert judge.complaints([torch.full((1, 1, 1, 1), 65504.0, dtype=torch.float16)])


@pytest.mark.parametrize("wrong", [lambda t: t * (1 + 1e-5), lambda t: t.bfloat16().float()], ids=["scaled", "rounded"])
@pytest.mark.parametrize("info", OPS.values(), ids=OPS.keys())
def test_a_small_mistake_is_found_in_every_result(info: OpInfo, wrong: Callable[[Tensor], Tensor]) -> None:
    sample = info.sample((2, 16, 7, 7))
    grad = info.gradient(sample)
    right = run(info.reference, sample, grad)
    judge = Judge(info, sample, grad)
    assert not judge.complaints(right)
    for i in range(len(right)):
        if not right[i].any():  # a gradient that is exactly 0 is so in all dtypes, and scaled
            assert info.name == "global_context"
            continue
        results = [wrong(t) if i == j else t for j, t in enumerate(right)]
        assert len(judge.complaints(results)) == 1
