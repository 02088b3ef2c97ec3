"""scSE against the module of segmentation_models_pytorch, and against the authors' layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import convblocks
from tests.accelerate.sources import CHANNELS, SmpSCSEModule, complaint, made


class AuthorsLayer(nn.Module):
    """ChannelSpatialSELayer, as it was published: linear layers, and the larger of the two maps."""

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.cSE, self.sSE = nn.Module(), nn.Module()
        self.cSE.fc1 = nn.Linear(channels, channels // reduction)
        self.cSE.fc2 = nn.Linear(channels // reduction, channels)
        self.sSE.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        channel: Any = self.cSE
        spatial: Any = self.sSE
        n, c, h, w = x.shape
        hidden = torch.relu(channel.fc1(x.reshape(n, c, -1).mean(2)))
        gates = torch.sigmoid(channel.fc2(hidden))
        return torch.max(x * gates.view(n, c, 1, 1), x * torch.sigmoid(spatial.conv(x)).view(n, 1, h, w))


def _run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("theirs", ["smp", "authors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_same_as_theirs(
    theirs: str, dtype: torch.dtype, memory_format: torch.memory_format, backend: str, device: str
) -> None:
    """In training and evaluation: output and all gradients."""
    if theirs == "smp":
        module, block = made(lambda: SmpSCSEModule(CHANNELS)), convblocks.SCSE(CHANNELS)
    else:
        module, block = made(lambda: AuthorsLayer(CHANNELS)), convblocks.SCSE(CHANNELS, 2, mode="max")
    module, block = module.to(device, dtype), block.to(device, dtype)
    block.load_state_dict(convblocks.convert_state_dict(module.state_dict()), strict=True)
    x = torch.randn(3, CHANNELS, 7, 9).to(device, dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    for train in (True, False):
        module.train(train)
        block.train(train)
        exact = _run(copy.deepcopy(module).double(), x.double(), grad.double())
        before, after = _run(module, x, grad), _run(block, x, grad)
        assert after[0].stride() == x.stride()
        for a, b, c in zip(after, before, exact, strict=True):
            assert a.dtype == b.dtype
            assert complaint(a.reshape(c.shape), b, c) is None


@pytest.mark.parametrize("mode", ["add", "max", "mul", "concat"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_its_parts(mode: str, bias: bool, backend: str, device: str) -> None:
    block = convblocks.SCSE(CHANNELS, 4, mode=mode, bias=bias).to(device)
    x = torch.randn(2, CHANNELS, 5, 6, device=device)
    torch.testing.assert_close(block(x), block.unfused(x))
    torch.testing.assert_close(block.sSE(x), block.sSE.unfused(x))
    torch.testing.assert_close(block.cSE(x), block.cSE.unfused(x))
    assert sum(p.numel() for p in block.parameters()) == 2 * 24 * 6 + 24 + bias * (24 + 6 + 1)


def test_widths() -> None:
    """At least one hidden unit; and as many parameters as the implementations have for 64 channels."""
    assert [convblocks.SCSE(c, r).cSE.fc1.out_channels for c, r in ((3, 16), (15, 2), (64, 16))] == [1, 7, 4]
    assert convblocks.SCSE(3)(torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)
    counts = [
        sum(p.numel() for p in m.parameters())
        for m in (convblocks.SCSE(64, 2), convblocks.SCSE(64, 2, bias=False), convblocks.SCSE(64), SmpSCSEModule(64))
    ]
    assert counts == [64 * 64 + 96 + 65, 4160, *[counts[3]] * 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convblocks.SCSE(0), "SCSE: expected channels to be a positive integer, got 0"),
        (lambda: convblocks.SCSE(8, 0), "SCSE: expected reduction to be a positive integer, got 0"),
        (lambda: convblocks.SCSE(8, mode="sum"), "SCSE: expected mode to be one of add, max, mul, concat, got sum"),
        (lambda: convblocks.ChannelSE(8, -1), "ChannelSE: expected reduction to be a positive integer, got -1"),
        (lambda: convblocks.SpatialSE(0), "SpatialSE: expected channels to be a positive integer, got 0"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["cSE.fc2", "sSE.conv"])
def test_pruned_parametrized_and_hooked_layers(name: str) -> None:
    """A layer that is more than its weight and bias is called; so is a part with a hook."""
    x = torch.randn(2, CHANNELS, 5, 5)
    block = convblocks.SCSE(CHANNELS)
    plain = block(x)
    expected = copy.deepcopy(block)
    with torch.no_grad():
        expected.get_parameter(f"{name}.weight").mul_(2)
    doubled = copy.deepcopy(block)
    parametrize.register_parametrization(doubled.get_submodule(name), "weight", _Double())
    torch.testing.assert_close(doubled(x), expected(x))
    pruned = copy.deepcopy(block)
    prune.identity(pruned.get_submodule(name), "weight")
    torch.testing.assert_close(pruned(x), plain)
    seen: list[str] = []
    for part in (name, name.partition(".")[0]):
        block.get_submodule(part).register_forward_hook(lambda *_, part=part: seen.append(part))
    torch.testing.assert_close(block(x), plain)
    assert seen == [name, name.partition(".")[0]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_copied_traced_exported_compiled() -> None:
    module, x = convblocks.SCSE(CHANNELS, mode="concat").eval(), torch.randn(2, CHANNELS, 6, 6)
    torch.compiler.reset()
    for other in (
        copy.deepcopy(module),
        torch.jit.trace(module, x),
        torch.fx.symbolic_trace(module),
        torch.export.export(module, (x,)).module(),
        torch.compile(module, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(other(x), module(x))
