"""A replaced module computes what it did before: output, gradients, dtype and memory format."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import convblocks
from tests.accelerate.sources import CHANNELS, complaint, each_source, made, timm, torchvision


def _run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def _accelerated(module: nn.Module) -> nn.Module:
    fast = copy.deepcopy(module)
    report = convblocks.accelerate(fast, include="", strict=True)  # itself, nothing in it
    assert len(report.replaced) == 1
    assert convblocks.is_accelerated(fast)
    return fast


@each_source
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_output_and_gradients(
    make: Callable[[], nn.Module], dtype: torch.dtype, memory_format: torch.memory_format, backend: str, device: str
) -> None:
    module = made(make).to(device, dtype)
    fast = _accelerated(module)
    x = torch.randn(3, CHANNELS, 7, 9).to(device, dtype).contiguous(memory_format=memory_format)
    for train in (True, False):
        grad = torch.randn_like(copy.deepcopy(module)(x))
        exact = _run(copy.deepcopy(module).train(train).double(), x.double(), grad.double())
        before = _run(module.train(train), x, grad)
        after = _run(fast.train(train), x, grad)
        assert after[0].stride() == torch.empty_like(before[0], memory_format=memory_format).stride()
        for a, b, c in zip(after, before, exact, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert complaint(a, b, c) is None
    with torch.no_grad():
        assert torch.equal(fast(x), after[0])


@each_source
@pytest.mark.parametrize(
    ("autocast", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
    ids=lambda d: str(d)[6:],
)
def test_autocast_dtype(
    make: Callable[[], nn.Module], autocast: torch.dtype, dtype: torch.dtype, backend: str, device: str
) -> None:
    module = made(make).to(device)
    fast = _accelerated(module)
    x = torch.randn(2, CHANNELS, 6, 6).to(device, dtype).requires_grad_()
    with torch.autocast(device, autocast):
        before, after = module(x), fast(x)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
    grads = (
        torch.autograd.grad(y.float().square().sum(), [x, *m.parameters()])
        for y, m in ((before, module), (after, fast))
    )
    for b, a in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.1 * b.norm()  # a value that is rounded across a kink has another gradient


def test_shufflenet(backend: str, device: str) -> None:
    """All units of a whole network, in training: outputs, gradients and statistics."""
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5).to(device)
    fast = copy.deepcopy(model)
    report = convblocks.accelerate(fast, include="torchvision.*", strict=True)
    assert [e.operation for e in report.replaced] == ["concat_shuffle"] * 16
    x = torch.randn(2, 3, 64, 64, device=device)
    results = []
    for m in (model, fast):
        y = m(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters())), *m.buffers()])
    for after, before in zip(*reversed(results), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * before.abs().max().item())


def test_a_shuffle_of_other_than_feature_maps(backend: str, device: str) -> None:
    """torch shuffles any rank and dtype."""
    shuffle = nn.ChannelShuffle(2)
    convblocks.accelerate(shuffle, strict=True)
    for x in (torch.randn(2, 6, 5), torch.randn(2, 6, 3, 2, 2), torch.arange(24).view(1, 6, 2, 2)):
        assert torch.equal(shuffle(x.to(device)), nn.ChannelShuffle(2)(x.to(device)))


def test_timm_autocast_dtype_of_a_whole_network(backend: str, device: str) -> None:
    model = timm.create_model("ecaresnet26t", num_classes=5).to(device).eval()
    x = torch.randn(1, 3, 64, 64, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        before = model(x)
        convblocks.accelerate(model, strict=True)
        after = model(x)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
