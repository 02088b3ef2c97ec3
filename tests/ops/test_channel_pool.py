"""What is special about pooling over channels: its maximum and what ties do. The shared tests do the rest."""

from __future__ import annotations

import pytest
import torch

from convblocks.opinfo import LAYOUTS
from convblocks.ops import channel_pool
from tests.ops.common import both_layouts


@both_layouts
@pytest.mark.parametrize("gated", [True, False])
def test_channels_that_share_the_maximum_share_its_gradient(
    gated: bool, layout: str, backend: str, device: str
) -> None:
    """As of torch.amax, and not as of torch.max, which gives it to one of them."""
    x = torch.tensor([3.0, 1.0, 3.0, -2.0, 3.0], device=device).view(1, 5, 1, 1).repeat(2, 1, 3, 2)
    x = LAYOUTS[layout](x).requires_grad_()
    channel = torch.full((2, 5, 1, 1), 0.5, device=device) if gated else None
    y = channel_pool(x, channel)
    (grad,) = torch.autograd.grad(y[:, 1].sum(), x)
    share = (0.5 if gated else 1.0) / 3
    expected = torch.tensor([share, 0.0, share, 0.0, share], device=device).view(1, 5, 1, 1).expand_as(x)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(y[:, 1], torch.full_like(y[:, 1], 1.5 if gated else 3.0))


@both_layouts
@pytest.mark.parametrize("size", [(2, 130, 9, 7), (1, 3, 40, 41), (2, 64, 1, 1)])
def test_more_than_a_tile(size: tuple[int, int, int, int], layout: str, backend: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(size, device=device)).requires_grad_()
    channel = torch.rand(*size[:2], 1, 1, device=device, requires_grad=True)
    v = x * channel
    y, expected = channel_pool(x, channel), torch.cat((v.mean(1, True), v.amax(1, True)), 1)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    got, want = (torch.autograd.grad(t, (x, channel), grad) for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@both_layouts
def test_ties_of_channels_of_several_tiles(layout: str, backend: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randint(-2, 3, (2, 130, 9, 7), device=device).float()).requires_grad_()
    y, grad = channel_pool(x), torch.randn(2, 2, 9, 7, device=device)
    (got,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(torch.cat((x.mean(1, True), x.amax(1, True)), 1), x, grad)
    torch.testing.assert_close(got, expected)


@both_layouts
def test_a_maximum_below_zero(layout: str, backend: str, device: str) -> None:
    """Where a vector or a tile is not full, what is not there is no zero."""
    x = LAYOUTS[layout](-1 - torch.rand(2, 19, 5, 3, device=device))
    torch.testing.assert_close(channel_pool(x)[:, 1], x.amax(1))
