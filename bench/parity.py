"""The gate before any timing: against the float64 reference, at most twice the error that torch makes in that dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convblocks.check import error


class Mismatch(Exception):
    """An output is further from the exact one than it may be."""


def allowed(torch_runs: Sequence[Tensor], exact: Tensor) -> float:
    """Twice the error of torch, the larger one of its runs, and a few units in the last place of the largest value.

    Those few, because torch's error in one number can be zero by luck: one for a half-precision result that is rounded
    once, eight for another order of summation.
    """
    dtype = torch_runs[0].dtype
    size = exact[exact.isfinite()].abs()
    units = (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps
    return 2 * max(error(run, exact) for run in torch_runs) + units * (size.max().item() if size.numel() else 0.0)


def check(got: Sequence[Tensor], torch_runs: Sequence[Sequence[Tensor]], exact: Sequence[Tensor]) -> None:
    """Raises Mismatch for the first output that is wrong."""
    for i, outputs in enumerate(zip(got, exact, *torch_runs, strict=True)):
        ours, right, *others = (t.detach() for t in outputs)
        name = "output" if i == 0 else f"gradient of input {i - 1}"
        if ours.shape != right.shape:
            raise Mismatch(f"{name}: expected size {list(right.shape)}, got {list(ours.shape)}")
        off, bound = error(ours, right), allowed(others, right)
        if not off <= bound:
            raise Mismatch(f"{name}: error {off:.3g}, allowed {bound:.3g}")
