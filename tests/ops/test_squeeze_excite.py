"""What is special about squeeze-excite: it is timm's and torchvision's; maxima tie. The shared tests do the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from convblocks.ops import squeeze_excite


def _layers(first: str, second: str, **options: Any) -> Callable[[Any, Tensor], Tensor]:
    def call(m: Any, x: Tensor) -> Tensor:
        a, b = getattr(m, first), getattr(m, second)
        return squeeze_excite(x, a.weight, a.bias, b.weight, b.bias, **options)

    return call


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "timm SEModule": (lambda: SEModule(24), _layers("fc1", "fc2")),
    "timm SEModule, average and max": (
        lambda: SEModule(24, add_maxpool=True, bias=False),
        _layers("fc1", "fc2", add_maxpool=True),
    ),
    "timm SqueezeExcite": (
        lambda: SqueezeExcite(24, act_layer=nn.SiLU),
        _layers("conv_reduce", "conv_expand", activation="silu"),
    ),
    "timm SqueezeExcite, hard": (
        lambda: SqueezeExcite(24, act_layer=nn.Hardswish, gate_layer="hard_sigmoid"),
        _layers("conv_reduce", "conv_expand", activation="hardswish", gate="hardsigmoid"),
    ),
    "timm EffectiveSEModule": (
        lambda: EffectiveSEModule(24),
        lambda m, x: squeeze_excite(x, None, None, m.fc.weight, m.fc.bias, gate="hardsigmoid"),
    ),
    "torchvision SqueezeExcitation": (
        lambda: SqueezeExcitation(24, 6, scale_activation=nn.Hardsigmoid),
        _layers("fc1", "fc2", gate="hardsigmoid"),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_equals(name: str, backend: str, device: str) -> None:
    make, call = MODULES[name]
    module = make().to(device)
    x = torch.randn(2, 24, 9, 7, device=device, requires_grad=True)
    y, expected = call(module, x), module(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(x)
    got, want = (torch.autograd.grad(t, (x, *module.parameters()), grad) for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_dtype_under_autocast(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    make, call = MODULES[name]
    module = make().to(device)
    x = torch.randn(2, 24, 9, 7, device=device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        y, expected = call(module, x), module(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_that_share_the_maximum_share_its_gradient(
    layout: torch.memory_format, backend: str, device: str
) -> None:
    x = torch.randint(0, 3, (2, 8, 6, 5), device=device).float()  # many ties
    x[0, 0] = 1  # all tie
    x = x.to(memory_format=layout).requires_grad_()
    w = torch.randn(8, 8, device=device)
    y = squeeze_excite(x, None, None, w, None, add_maxpool=True)
    s = 0.5 * x.mean((2, 3)) + 0.5 * x.amax((2, 3))
    expected = x * torch.sigmoid(s @ w.T)[:, :, None, None]
    grad = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))


def test_weights_of_a_linear_layer_and_of_a_convolution_are_the_same(backend: str, device: str) -> None:
    x = torch.randn(2, 8, 6, 5, device=device)
    w1, w2 = torch.randn(3, 8, device=device), torch.randn(8, 3, device=device)
    y = squeeze_excite(x, w1, None, w2, None)
    assert torch.equal(y, squeeze_excite(x, w1[:, :, None, None], None, w2[:, :, None, None], None))
