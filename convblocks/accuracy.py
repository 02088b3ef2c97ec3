"""The rule of accuracy: one for the tests, the self-test and the benchmark.

A result is right if it is NaN or Inf just where the exact one is, the reference in float64, and if its largest error is
at most twice that of torch in the same dtype, and one rounding of the largest value. One number, or a sum of terms that
nearly cancel such as the gradient of a bias, torch may hit by luck: a result that fails so far may err in addition by
as much as the exact one moves when each input moves by a few units in the last place; in float64 by twice that, as
there the exact one is uncertain itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convblocks.opinfo import OpInfo, Sample

MOVES = 4  # how often the inputs are moved,
UNITS = 4  # and by how many units in the last place at most


def run(op: Callable[..., Tensor], sample: Sample, grad: Tensor | None = None) -> list[Tensor]:
    """The output, and with ``grad`` the gradients of all tensors of the call."""
    if grad is None:
        with torch.no_grad():
            return [op(*sample.args, **sample.kwargs)]
    sample = sample.map(lambda t: t.detach().requires_grad_())
    y = op(*sample.args, **sample.kwargs)
    return [y.detach(), *torch.autograd.grad(y, sample.tensors(), grad)]


def error(got: Tensor, exact: Tensor) -> float:
    """The largest absolute error where both are finite."""
    got = got.to(exact)
    difference = (got - exact).abs()[got.isfinite() & exact.isfinite()]
    return difference.max().item() if difference.numel() else 0.0


def fault(got: Tensor, exact: Tensor) -> str | None:
    """What no error measures: another size, or NaN and Inf where they should not be.

    Inf is right where the exact value is too large for the dtype.
    """
    if got.shape != exact.shape:
        return f"expected size {list(exact.shape)}, got {list(got.shape)}"
    got = got.to(exact.device)
    expected = exact.to(got.dtype)
    wrong = (~expected.isfinite() | ~got.isfinite()) & (expected != got) & ~(expected.isnan() & got.isnan())
    if not wrong.any():
        return None
    where = tuple(wrong.nonzero()[0].tolist())
    return f"{wrong.sum()} values not finite alike, first {got[where]} for {expected[where]} at {list(where)}"


def limit(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The error allowed in ``dtype``, by the error of ``plain``; where that is of another dtype it is scaled."""
    eps = torch.finfo(dtype).eps
    finite = exact[exact.to(dtype).isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    return 2 * error(plain, exact) * eps / torch.finfo(plain.dtype).eps + eps * size


@dataclass(frozen=True)
class Verdict:
    """What was found in the output of a call, or in one of its gradients."""

    name: str
    error: float
    allowed: float
    fault: str | None = None  # what no error measures; the error is infinite then

    @property
    def share(self) -> float:
        return self.error / self.allowed if self.allowed else (torch.inf if self.error else 0.0)

    @property
    def right(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: {self.fault or f'error {self.error:.3g}, allowed {self.allowed:.3g}'}"


class Judge:
    """Knows what a call should give, by the reference in float64 on ``device`` (else where the sample lies)."""

    def __init__(self, info: OpInfo, sample: Sample, grad: Tensor | None, device: str | None = None) -> None:
        self._reference, self._sample, self._grad, self._device = info.reference, sample, grad, device
        dtype = sample.x.dtype
        self.exact = self._exact(lambda t: t.detach().to(device, torch.float64))
        if dtype == torch.float64:  # torch's error there is taken to be that of float32, scaled down
            plain = run(info.reference, sample.map(Tensor.float), None if grad is None else grad.float())
        else:
            plain = run(info.reference, sample, grad)
        like = sample.tensors() if grad is not None else []
        dtypes = [dtype, *(t.dtype for t in like)]
        self._limits = [limit(p, e, d) for p, e, d in zip(plain, self.exact, dtypes, strict=True)]

    def verdicts(self, results: Sequence[Tensor]) -> list[Verdict]:
        """One for the output, and one for each gradient."""
        faults = list(map(fault, results, self.exact))
        errors = [
            torch.inf if wrong else error(got, exact)
            for wrong, got, exact in zip(faults, results, self.exact, strict=True)
        ]
        limits = self._limits
        if any(allowed < e < torch.inf for e, allowed in zip(errors, limits, strict=True)):
            share = 2 if self._sample.x.dtype == torch.float64 else 1
            limits = [a + share * b for a, b in zip(limits, self._uncertainty, strict=True)]
        names = ["output", *(f"gradient of input {i}" for i in range(len(results) - 1))]
        return list(map(Verdict, names, errors, limits, faults))

    def complaints(self, results: Sequence[Tensor]) -> list[str]:
        return [str(v) for v in self.verdicts(results) if not v.right]

    @cached_property
    def _uncertainty(self) -> list[float]:
        """How far the exact results move when the inputs do."""
        generator = torch.Generator().manual_seed(0)

        def move(t: Tensor) -> Tensor:
            relative = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
            wide = t.detach().to(self._device, torch.float64)
            return wide * (1 + UNITS * torch.finfo(t.dtype).eps * relative.to(wide.device))

        moved = [self._exact(move) for _ in range(MOVES)]
        return [max(error(m[i], exact) for m in moved) for i, exact in enumerate(self.exact)]

    def _exact(self, convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        grad = None if self._grad is None else convert(self._grad)
        return run(self._reference, self._sample.map(convert), grad)
