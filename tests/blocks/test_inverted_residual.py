"""The blocks of MobileNetV2 and V3 and of EfficientNets."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.efficientnet import FusedMBConv as TheirFusedMBConv
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.efficientnet import MBConv as TheirMBConv
from torchvision.models.mobilenetv2 import InvertedResidual as TheirInvertedResidual

from convblocks import SCSE, FusedMBConv, InvertedResidual, MBConv, SimAM
from convblocks.blocks.inverted_residual import make_divisible
from tests.models.common import randomised


def _same(ours: nn.Module, theirs: nn.Module, channels: int) -> None:
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    for train in (True, False):
        results = []
        for block in (ours.double().train(train), theirs.double().train(train)):
            image = x.clone().requires_grad_()
            y = block(image)
            (gradient,) = torch.autograd.grad(y.square().sum(), image)
            results.append((y, gradient))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("c", "out", "stride", "expand"), [(32, 16, 1, 1), (16, 24, 2, 6), (24, 24, 1, 6), (8, 8, 1, 1)]
)
def test_inverted_residual_is_torchvisions(c: int, out: int, stride: int, expand: int) -> None:
    theirs = randomised(lambda: TheirInvertedResidual(c, out, stride, expand))
    _same(InvertedResidual(c, out, stride, expand), theirs, c)


@pytest.mark.parametrize(("c", "out", "stride", "expand"), [(16, 24, 2, 4), (24, 24, 1, 6), (24, 24, 1, 1)])
def test_mbconv_is_torchvisions(c: int, out: int, stride: int, expand: int) -> None:
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    theirs = randomised(lambda: TheirMBConv(MBConvConfig(expand, 3, stride, c, out, 1), 0.0, norm))
    _same(MBConv(c, out, stride, expand), theirs, c)
    theirs = randomised(lambda: TheirFusedMBConv(FusedMBConvConfig(expand, 3, stride, c, out, 1), 0.0, norm))
    _same(FusedMBConv(c, out, stride, expand), theirs, c)


def test_parameters() -> None:
    assert sum(p.numel() for p in InvertedResidual(32, 64, 1, 6).parameters()) == 21_056


def test_channels_are_rounded() -> None:
    """As in torchvision and timm: never below nine tenths."""
    assert [make_divisible(c) for c in (1, 11, 12, 18, 19, 32 * 0.35, 42, 43)] == [8, 16, 16, 24, 24, 16, 40, 40]


@pytest.mark.parametrize("keys", ["v2", "v3"])
@pytest.mark.parametrize("attention", ["se", "cbam", "simam", lambda channels: SCSE(channels, 2)])
def test_attention_is_between(keys: str, attention: Any) -> None:
    """Between the depthwise convolution and the projection."""
    block = InvertedResidual(16, 16, attention=attention, keys=keys).eval()
    layers = list(block._modules[block.branch])
    x = torch.randn(2, 16, 5, 5)
    y = x
    for layer in layers:
        y = layer(y)
    assert len(layers) == (5 if keys == "v2" else 4)
    torch.testing.assert_close(block(x), x + y)


def test_default_squeeze_excite() -> None:
    """A quarter of the expanded channels in MobileNetV3, of the block's in EfficientNet."""
    v3 = InvertedResidual(40, 40, expanded_channels=120, attention="se", keys="v3").block[2]
    assert (v3.fc1.out_channels, v3.activation_name, v3.gate_name) == (32, "relu", "hardsigmoid")
    se = MBConv(40, 40).block[2]
    assert (se.fc1.out_channels, se.activation_name, se.gate_name) == (10, "silu", "sigmoid")
    assert isinstance(MBConv(40, 40, attention="simam").block[2], SimAM)


@pytest.mark.parametrize("make", [InvertedResidual, MBConv, FusedMBConv])
def test_drop_path(make: Any) -> None:
    """A sample that skips the block is passed on as it is; the others' branch is scaled up."""
    block = make(8, 8, drop_path=0.5)
    x = torch.randn(64, 8, 4, 4)
    torch.manual_seed(0)
    y = block(x)
    skipped = (y == x).all((1, 2, 3))
    assert 10 < int(skipped.sum()) < 54
    block.drop_path = 0.0
    torch.testing.assert_close((y - x)[~skipped], 2 * (block(x) - x)[~skipped], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [InvertedResidual, MBConv, FusedMBConv])
def test_refuses(make: Any) -> None:
    name = make.__name__
    for options, message in (
        ({"in_channels": 0}, "expected in_channels to be a positive integer, got 0"),
        ({"out_channels": 1.5}, "expected out_channels to be a positive integer, got 1.5"),
        ({"stride": 3}, "expected a stride of 1 or 2, got 3"),
        ({"kernel_size": 4}, "expected an odd kernel_size, got 4"),
        ({"drop_path": 1.0}, "expected drop_path from 0 to below 1, got 1.0"),
        ({"expand_ratio": -1}, "expected .*, got -"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            make(**{"in_channels": 8, "out_channels": 8, **options})


def test_refuses_names() -> None:
    with pytest.raises(ValueError, match="InvertedResidual: expected keys to be one of v2, v3, got v1"):
        InvertedResidual(8, 8, keys="v1")
    with pytest.raises(ValueError, match=r"expected activation to be one of .*, got mish"):
        InvertedResidual(8, 8, activation="mish")
    with pytest.raises(ValueError, match=r"MBConv: expected attention to be one of .*, got sea"):
        MBConv(8, 8, attention="sea")
