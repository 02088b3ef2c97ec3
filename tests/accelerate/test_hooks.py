"""Hooks of an accelerated module, of its layers and of what is in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import convblocks
from tests.accelerate.sources import CHANNELS, CbamModule, InvertedResidual, SEModule, SmpSCSEModule, made, network


def test_hooks_on_the_module_fire() -> None:
    model, x = network().eval(), torch.randn(2, 3, 14, 14)
    convblocks.accelerate(model, strict=True)
    seen: list[str] = []
    model[6].register_forward_hook(lambda *_: seen.append("forward"))
    model[6].register_full_backward_hook(lambda *_: seen.append("backward"))
    model(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


@pytest.mark.parametrize("stride", [1, 2])
def test_hooks_in_the_branches_of_a_unit_fire(stride: int) -> None:
    """Those that were there before, which the comparison does not run, and later ones; so do changes of its layers."""
    unit = made(lambda: InvertedResidual(CHANNELS, CHANNELS * stride, stride)).eval()
    seen: list[str] = []
    unit.branch2[0].register_forward_hook(lambda *_: seen.append("before"))
    (entry,) = convblocks.accelerate(unit, include="", strict=True).replaced
    assert entry.reason == "not compared: hooks in it would run"
    assert not seen
    unit.branch2[5].register_full_backward_hook(lambda *_: seen.append("backward"))
    unit.branch2.register_forward_hook(lambda *_: seen.append("branch"))
    prune.l1_unstructured(unit.branch2[3], "weight", 0.5)
    x = torch.randn(2, CHANNELS, 6, 6, requires_grad=True)
    y = unit(x)
    y.sum().backward()
    assert seen == ["before", "branch", "backward"]
    convblocks.revert(unit)
    assert torch.equal(unit(x), y)


def test_backward_hook_of_a_layer_afterwards_fires() -> None:
    module = made(lambda: SEModule(CHANNELS))
    convblocks.accelerate(module, strict=True)
    seen: list[str] = []
    module.fc2.register_full_backward_hook(lambda *_: seen.append("full"))
    module(torch.randn(2, CHANNELS, 6, 6, requires_grad=True)).sum().backward()
    assert seen == ["full"]


def test_changes_in_the_parts_of_cbam_afterwards_count() -> None:
    """A hook on any layer, another activation or convolution: what is in the module is called again."""
    x = torch.randn(2, CHANNELS, 6, 6)
    module = made(lambda: CbamModule(CHANNELS, rd_ratio=1 / 4)).eval()
    convblocks.accelerate(module, include="", strict=True)
    plain = module(x)
    seen: list[str] = []
    layers = {"gate": module.channel.gate, "block": module.spatial.conv, "conv": module.spatial.conv.conv}
    handles = [layer.register_forward_hook(lambda *_, n=name: seen.append(n)) for name, layer in layers.items()]
    torch.testing.assert_close(module(x), plain)
    assert seen == ["gate", "conv", "block"]
    for handle in handles:
        handle.remove()
    module.channel.act = nn.SiLU()
    torch.testing.assert_close(module(x), module.spatial(module.channel(x)))
    module.spatial.conv.conv = nn.Conv2d(2, 1, 3, padding=1)
    torch.testing.assert_close(module(x), module.spatial(module.channel(x)))


def test_changes_in_the_parts_of_scse_afterwards_count() -> None:
    """A hook on any layer, another activation, one layer more: what is in the module is called again."""
    x = torch.randn(2, CHANNELS, 6, 6)
    module = made(lambda: SmpSCSEModule(CHANNELS))
    convblocks.accelerate(module, include="", strict=True)
    plain = module(x)
    seen: list[str] = []
    handle = module.cSE[4].register_forward_hook(lambda *_: seen.append("gate"))
    module.sSE.register_forward_hook(lambda *_: seen.append("part"))
    torch.testing.assert_close(module(x), plain)
    assert seen == ["gate", "part"]
    handle.remove()
    for change in (lambda: module.cSE.__setitem__(2, nn.SiLU()), lambda: module.sSE.append(nn.ReLU())):
        change()
        torch.testing.assert_close(module(x), x * module.cSE(x) + x * module.sSE(x))
