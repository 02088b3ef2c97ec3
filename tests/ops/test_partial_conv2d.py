from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convblocks.ops import partial_conv2d
from convblocks.ops.partial_conv2d import reference


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_place(layout: torch.memory_format, backend: str, device: str) -> None:
    """Only the first channels are written, and the input itself is returned."""
    x = torch.randn(2, 9, 6, 5, device=device).to(memory_format=layout)
    weight = torch.randn(3, 3, 3, 3, device=device)
    expected, rest = reference(x, weight), x[:, 3:].clone()
    with torch.no_grad():
        y = partial_conv2d(x, weight, inplace=True)
    assert y is x
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:, 3:], rest)


@pytest.mark.parametrize("which", ["an input", "a weight"])
def test_in_place_where_a_gradient_is_wanted(which: str, backend: str, device: str) -> None:
    x, weight = torch.randn(2, 8, 5, 5, device=device), torch.randn(2, 2, 3, 3, device=device)
    before = x.clone()
    (x if which == "an input" else weight).requires_grad_()
    words = f"^partial_conv2d: expected inplace only where no gradient is wanted, got {which} that requires it$"
    with pytest.raises(ValueError, match=words):
        partial_conv2d(x, weight, inplace=True)
    assert torch.equal(x, before)


def test_channels_that_are_passed_on_are_exact(backend: str, device: str) -> None:
    x = torch.randn(2, 8, 5, 5, device=device, dtype=torch.bfloat16)
    y = partial_conv2d(x, torch.randn(2, 2, 3, 3, device=device))
    assert torch.equal(y[:, 2:], x[:, 2:])


@pytest.mark.parametrize("p", [1, 2, 8, 15, 16])
def test_single_pixels_in_channels_last(p: int, backend: str, device: str) -> None:
    """A pixel may have any stride, as that of a convolution's output has."""
    x = torch.randn(2, 16, 1, 1).to(device).contiguous(memory_format=torch.channels_last)
    x = x.as_strided(x.shape, (16, 1, 16, 16))
    w = torch.randn(p, p, 3, 3).to(device)
    torch.testing.assert_close(partial_conv2d(x, w), torch.cat((F.conv2d(x[:, :p], w, padding=1), x[:, p:]), 1))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # the others are GPUs', where torch has no such fault
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_gradient_of_weights_that_meet_no_nan(kernel: int, backend: str, device: str) -> None:
    """torch's own, in bfloat16 with AVX-512, is NaN for more of them."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 8, 5, device=device, dtype=torch.bfloat16)
    x[0, 3, 2, 4] = float("nan")
    weight = torch.randn(20, 20, kernel, kernel, device=device, dtype=torch.bfloat16, requires_grad=True)
    partial_conv2d(x, weight).sum().backward()
    grad = torch.ones(2, 20, 8, 5, dtype=torch.float64, device=device)
    exact = torch.nn.grad.conv2d_weight(x[:, :20].double(), weight.shape, grad, 1, kernel // 2)
    assert torch.equal(weight.grad.isnan(), exact.isnan())
