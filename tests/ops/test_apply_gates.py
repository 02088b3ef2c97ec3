"""What is special about gates of channels and pixels: a broadcast product. The shared tests do the rest."""

from __future__ import annotations

import pytest
import torch

from convblocks.opinfo import LAYOUTS
from convblocks.ops import apply_gates
from tests.ops.common import both_layouts


@both_layouts
@pytest.mark.parametrize("size", [(2, 130, 9, 7), (1, 3, 40, 41), (2, 64, 1, 1)])
def test_more_than_a_tile(size: tuple[int, int, int, int], layout: str, backend: str, device: str) -> None:
    """Channels and pixels that no tile holds: their sums come from several."""
    n, c, h, w = size
    x = LAYOUTS[layout](torch.randn(size, device=device)).requires_grad_()
    channel = torch.rand(n, c, 1, 1, device=device, requires_grad=True)
    spatial = torch.rand(n, 1, h, w, device=device, requires_grad=True)
    y, expected = apply_gates(x, channel, spatial), x * channel * spatial
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    inputs = (x, channel, spatial)
    got, want = (torch.autograd.grad(t, inputs, grad) for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "channel", "spatial"])
def test_gradients_that_nobody_wants(frozen: str, backend: str, device: str) -> None:
    tensors = {
        "x": torch.randn(2, 5, 4, 3, device=device),
        "channel": torch.rand(2, 5, 1, 1, device=device),
        "spatial": torch.rand(2, 1, 4, 3, device=device),
    }
    wanted = [t.requires_grad_() for name, t in tensors.items() if name != frozen]
    got = torch.autograd.grad(apply_gates(**tensors).sum(), wanted)
    expected = torch.autograd.grad((tensors["x"] * tensors["channel"] * tensors["spatial"]).sum(), wanted)
    torch.testing.assert_close(got, expected)
