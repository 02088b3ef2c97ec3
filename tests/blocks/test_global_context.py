"""Global context: the official block, and timm's accelerated, alone and in a network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import GlobalContext
from torch import Tensor, nn

import convblocks
from tests.accelerate.sources import CHANNELS, complaint, made, timm


class ContextBlock(nn.Module):
    """The official block, transcribed from the paper's code."""

    def __init__(self, inplanes: int, ratio: float, pooling_type: str, fusion_types: tuple[str, ...]) -> None:
        super().__init__()
        planes = int(inplanes * ratio)
        if pooling_type == "att":
            self.conv_mask = nn.Conv2d(inplanes, 1, kernel_size=1)
        for name in ("channel_add", "channel_mul"):
            layers = nn.Sequential(
                nn.Conv2d(inplanes, planes, kernel_size=1),
                nn.LayerNorm([planes, 1, 1]),
                nn.ReLU(inplace=True),
                nn.Conv2d(planes, inplanes, kernel_size=1),
            )
            setattr(self, f"{name}_conv", layers if name in fusion_types else None)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if hasattr(self, "conv_mask"):
            mask = self.conv_mask(x).view(n, 1, h * w).softmax(2).unsqueeze(-1)
            context = (x.reshape(n, 1, c, h * w) @ mask).view(n, c, 1, 1)
        else:
            context = x.mean((2, 3), keepdim=True)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


def _run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    names = sorted(dict(module.named_parameters()))
    parameters = dict(module.named_parameters())
    return [y.detach(), *torch.autograd.grad(y, [x, *(parameters[n] for n in names)], grad)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("pooling", "fusions"),
    [("att", ("channel_add",)), ("att", ("channel_mul",)), ("avg", ("channel_mul", "channel_add"))],
)
def test_official(pooling: str, fusions: tuple[str, ...], memory_format: Any, backend: str, device: str) -> None:
    theirs = made(lambda: ContextBlock(CHANNELS, 1 / 4, pooling, fusions)).to(device)
    ours = convblocks.GlobalContext.official(CHANNELS, 1 / 4, pooling, fusions).to(device)
    for sd in (
        convblocks.convert_state_dict(theirs.state_dict()),
        convblocks.convert_state_dict(theirs.state_dict(), source="official"),
        convblocks.convert_state_dict(theirs.state_dict(), model=ours),
    ):
        ours.load_state_dict(sd, strict=True)
    x = torch.randn(3, CHANNELS, 7, 9, device=device).contiguous(memory_format=memory_format)
    y, exact = ours(x), copy.deepcopy(theirs).double()(x.double())
    assert complaint(y, theirs(x), exact) is None
    grad = torch.randn_like(x)
    (got,) = torch.autograd.grad(ours(x.requires_grad_()), x, grad)
    before = _run(theirs, x, grad)[1]
    assert complaint(got, before, _run(copy.deepcopy(theirs).double(), x.double(), grad.double())[1]) is None


def test_begins_as_published() -> None:
    x = torch.randn(2, CHANNELS, 5, 5)
    block = convblocks.GlobalContext.official(CHANNELS, 1 / 4)
    assert block.mlp_add.norm.eps == 1e-5
    assert torch.equal(block(x), x)  # adds nothing yet
    assert block.conv_attn.bias.item() == 0
    torch.testing.assert_close(convblocks.GlobalContext.official(CHANNELS, 1 / 4, "att", ("channel_mul",))(x), x / 2)
    block = convblocks.GlobalContext(CHANNELS, fuse_add=True)
    assert (block.mlp_scale.norm.eps, block.mlp_scale.fc1.out_channels) == (1e-6, 3)
    assert not block.mlp_add.fc2.weight.any()
    assert block.mlp_scale.fc2.weight.any()


def test_parameters() -> None:
    """2 C R + 3 R + 2 C + 1, as in the paper's block."""
    block = convblocks.GlobalContext.official(64, 1 / 16)
    assert sum(p.numel() for p in block.parameters()) == 653


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("options", [{}, {"fuse_add": True, "fuse_scale": False}], ids=["gc", "gca"])
def test_accelerated(
    options: dict[str, bool], memory_format: Any, dtype: torch.dtype, backend: str, device: str
) -> None:
    module = made(lambda: GlobalContext(CHANNELS, rd_channels=5, **options)).to(device, dtype)
    fast = copy.deepcopy(module)
    assert len(convblocks.accelerate(fast, strict=True).replaced) == 1
    x = torch.randn(3, CHANNELS, 7, 9).to(device, dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    for train in (True, False):
        exact = _run(copy.deepcopy(module).train(train).double(), x.double(), grad.double())
        before, after = _run(module.train(train), x, grad), _run(fast.train(train), x, grad)
        assert after[0].stride() == x.stride()
        for a, b, c in zip(after, before, exact, strict=True):
            assert a.dtype == b.dtype
            assert complaint(a, b, c) is None


def test_accelerated_network(backend: str, device: str) -> None:
    model = timm.create_model("gcresnext26ts", num_classes=5).to(device)
    fast = copy.deepcopy(model)
    report = convblocks.accelerate(fast, include="timm.layers.global_context.*", strict=True)
    assert {e.operation for e in report.replaced} == {"global_context"}
    x = torch.randn(2, 3, 64, 64, device=device)
    results = []
    for m in (model, fast):
        y = m.eval()(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))])
    for after, before in zip(*reversed(results), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * max(1e-3, before.abs().max().item()))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m.mlp_scale, "drop", nn.Dropout(0.1)), "mlp_scale.drop is Dropout"),
        (lambda m: setattr(m.mlp_scale, "norm", nn.BatchNorm2d(3)), "mlp_scale.norm is BatchNorm2d"),
        (lambda m: setattr(m.mlp_scale, "act", nn.Mish()), r"act is Mish"),
        (lambda m: setattr(m, "gate", nn.Tanh()), "gate is Tanh"),
        (lambda m: setattr(m.mlp_add.norm, "eps", 1e-5), "its norms have different eps"),
        (lambda m: m.mlp_add.fc1.register_forward_hook(lambda *_: None), "mlp_add.fc1 has hooks"),
    ],
)
def test_refused(change: Any, why: str) -> None:
    module = GlobalContext(CHANNELS, fuse_add=True)
    change(module)
    (entry,) = convblocks.accelerate(module).entries
    assert why in str(entry)
