"""What is special about ECA: it is timm's EcaModule and CecaModule. The shared tests do the rest."""

from __future__ import annotations

import pytest
import torch
from timm.layers import CecaModule, EcaModule

from convblocks.ops import eca


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("circular", [False, True])
def test_equals_timm(k: int, circular: bool, backend: str, device: str) -> None:
    module = (CecaModule if circular else EcaModule)(kernel_size=k).to(device)
    x = torch.randn(2, 24, 9, 7, device=device, requires_grad=True)
    y = eca(x, module.conv.weight, padding="circular" if circular else "zeros")
    expected = module(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(x)
    got, want = (torch.autograd.grad(t, (x, module.conv.weight), grad) for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_dtype_under_autocast_is_timms(dtype: torch.dtype, backend: str, device: str) -> None:
    module = EcaModule(kernel_size=3).to(device)
    x = torch.randn(2, 24, 9, 7, device=device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        y, expected = eca(x, module.conv.weight), module(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_a_weight_wider_than_the_map(padding: str, backend: str, device: str) -> None:
    """Two channels and five taps: circular padding meets each channel more than once."""
    x, weight = torch.randn(2, 2, 4, 4, device=device), torch.randn(1, 1, 5, device=device)
    s = x.mean((2, 3)).tolist()
    w = weight.flatten().tolist()
    for n in range(2):
        for c in range(2):
            taps = [(c + i - 2, w[i]) for i in range(5)]
            at = sum(s[n][j % 2] * v for j, v in taps if padding == "circular" or 0 <= j < 2)
            gate = torch.sigmoid(torch.tensor(at, device=device))
            torch.testing.assert_close(eca(x, weight, padding=padding)[n, c], x[n, c] * gate)
