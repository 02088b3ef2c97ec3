"""What is special about SimAM; the shared tests do the rest."""

from __future__ import annotations

import pytest
import torch

from convblocks.accuracy import run
from convblocks.opinfo import OPS
from convblocks.ops import simam
from tests.ops.common import accuracy, random_like, with_grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_plane_of_one_pixel_is_nan_as_in_the_authors_code(
    layout: torch.memory_format, backend: str, device: str
) -> None:
    x = torch.randn(2, 40, 1, 1, device=device).to(memory_format=layout).requires_grad_()
    y = simam(x)
    y.sum().backward()
    assert y.isnan().all()
    assert x.grad is not None
    assert x.grad.isnan().all()


def test_a_flat_plane_is_scaled_by_sigmoid_of_a_half(backend: str, device: str) -> None:
    x = torch.full((2, 8, 9, 7), 3.0, device=device)
    torch.testing.assert_close(simam(x), x * torch.sigmoid(torch.tensor(0.5, device=device)))


def test_the_variance_survives_a_large_mean(backend: str, device: str) -> None:
    """sum(x * x) / n - mean * mean would lose it."""
    info = OPS["simam"]
    sample = info.sample((2, 8, 9, 7), device=device)
    sample = with_grad(sample.map(lambda x: x + 4000))
    grad = info.gradient(sample)
    wrong = accuracy(info, sample, run(info.op, sample, grad), grad)
    assert not wrong, "\n".join(wrong)


def test_the_energy_does_not_depend_on_shift_or_scale_of_the_gate(backend: str, device: str) -> None:
    """Without the regulariser the gate is the same for a x + b; the output then scales like x."""
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, device=device)
    gate, other = simam(x, 1e-12) / x, simam(3 * x + 2, 1e-12) / (3 * x + 2)
    torch.testing.assert_close(gate, other, rtol=1e-6, atol=1e-6)


def test_e_lambda_matters(backend: str, device: str) -> None:
    x = random_like(torch.empty(2, 8, 9, 7, device=device))
    assert not torch.allclose(simam(x, 1e-4), simam(x, 0.5))
