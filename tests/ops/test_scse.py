"""What is special about scSE: how the two gates are combined. The shared tests do the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convblocks.accuracy import run
from convblocks.opinfo import LAYOUTS, OPS
from convblocks.ops import scse
from tests.conftest import EMULATED, INTERPRETED
from tests.ops.common import accuracy, both_layouts, with_grad


def _parameters(c: int, r: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((r, c), (r,), (c, r), (c,), (1, c, 1, 1), (1,))
    return tuple(torch.randn(s, generator=generator).to(device) for s in sizes)


def _gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    return s[:, :, None, None], torch.sigmoid((x * w).sum(1, keepdim=True) + b)


@both_layouts
def test_combinations(layout: str, backend: str, device: str) -> None:
    """As the papers write them: sum, maximum and product of the two recalibrated maps, and their concatenation."""
    x = LAYOUTS[layout](torch.randn(2, 12, 6, 5, device=device))
    parameters = _parameters(12, 3, device)
    s, q = _gates(x, *parameters)
    torch.testing.assert_close(scse(x, *parameters), x * (s + q))
    torch.testing.assert_close(scse(x, *parameters, mode="max"), torch.where(x > 0, x * s.maximum(q), x * s.minimum(q)))
    torch.testing.assert_close(scse(x, *parameters, mode="mul"), x * x * s * q)
    torch.testing.assert_close(scse(x, *parameters, mode="concat"), torch.cat((x * s, x * q), 1))
    alone = scse(x, None, None, None, None, *parameters[4:])
    torch.testing.assert_close(alone, x * q)
    for mode in ("max", "mul", "concat"):
        assert torch.equal(scse(x, None, None, None, None, *parameters[4:], mode=mode), alone)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradients_of_the_maximum_at_ties(layout: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Half to each, as of torch.maximum: everywhere where both gates are one half, and else where x is zero."""
    x = torch.randn(2, 8, 5, 4, device=device, dtype=dtype).relu()  # half of it zeros
    x = LAYOUTS[layout](torch.cat((x, -x)))
    for scale in (0.0, 1.0):
        parameters = [(p * scale).to(dtype) for p in _parameters(8, 4, device)]
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *parameters)]
        grad = torch.randn_like(x)
        got = torch.autograd.grad(scse(*leaves, mode="max"), leaves, grad)
        exact = [t.detach().double().requires_grad_() for t in (x, *parameters)]
        s, q = _gates(*exact)
        want = torch.autograd.grad(torch.maximum(exact[0] * s, exact[0] * q), exact, grad.double())
        for a, b in zip(got, want, strict=True):
            tolerance = 64 * torch.finfo(dtype).eps * b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


# More channels than the CPU sums at a time, and pieces of a sample; more than a CUDA block keeps on chip of the map,
# and of the sums over its pixels. (The interpreter adds channels up one by one, which is less exact than any GPU.)
MANY = [(1, 300, 2, 3)] if INTERPRETED else [(2, 300, 28, 33), (2, 2500, 2, 3), (1, 13000, 1, 2)][bool(EMULATED) :]


@both_layouts
@pytest.mark.parametrize("mode", ["add", "max", "concat", "spatial"])
@pytest.mark.parametrize("size", MANY, ids=str)
def test_many_channels(size: tuple[int, int, int, int], mode: str, layout: str, backend: str, device: str) -> None:
    info = OPS["scse"]
    sample = with_grad(info.sample(size, {"mode": mode, "reduction": size[1] // 8}, layout=layout, device=device))
    grad = info.gradient(sample, layout)
    wrong = accuracy(info, sample, run(info.op, sample, grad), grad)
    assert not wrong, "\n".join(wrong)
