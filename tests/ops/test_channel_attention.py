"""What is special about channel attention: its maximum, and that it is timm's. The shared tests do the rest."""

from __future__ import annotations

import pytest
import torch
from timm.layers.cbam import ChannelAttn, LightChannelAttn

from convblocks.opinfo import LAYOUTS
from convblocks.ops import apply_gates, channel_attention, squeeze_excite
from tests.ops.common import both_layouts


@both_layouts
@pytest.mark.parametrize("bias", [False, True])
def test_equals_timm(bias: bool, layout: str, backend: str, device: str) -> None:
    module = ChannelAttn(40, rd_ratio=1 / 8, mlp_bias=bias).to(device)
    x = LAYOUTS[layout](torch.randn(3, 40, 13, 11, device=device)).requires_grad_()
    y = apply_gates(x, channel_attention(x, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias))
    expected = module(x)
    torch.testing.assert_close(y, expected)
    inputs, grad = (x, *module.parameters()), torch.randn_like(x)
    got, want = (torch.autograd.grad(t, inputs, grad) for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_squeeze_excite_is_the_light_form(backend: str, device: str) -> None:
    module = LightChannelAttn(40, rd_ratio=1 / 8).to(device)
    x = torch.randn(3, 40, 13, 11, device=device)
    y = squeeze_excite(x, module.fc1.weight, None, module.fc2.weight, None, add_maxpool=True)
    torch.testing.assert_close(y, module(x))


@both_layouts
def test_pixels_that_share_the_maximum_share_its_gradient(layout: str, backend: str, device: str) -> None:
    """As of torch.amax, and not as of torch.max or max pooling, which give it to one of them; in several tiles."""
    c, h, w = 20, 17, 19
    x = torch.randn(2, c, h, w, device=device).clamp(max=0.5)
    x = LAYOUTS[layout](x).requires_grad_()
    w1, w2 = torch.randn(5, c, device=device), torch.randn(c, 5, device=device)
    exact = x.detach().double().requires_grad_()
    mlp = [(torch.relu(p @ w1.double().T)) @ w2.double().T for p in (exact.mean((2, 3)), exact.amax((2, 3)))]
    (expected,) = torch.autograd.grad(torch.sigmoid(mlp[0] + mlp[1]).square().sum(), exact)
    (got,) = torch.autograd.grad(channel_attention(x, w1, None, w2, None).square().sum(), x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
