"""What is special about the convolutions that accelerate() replaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import convblocks
from tests.accelerate.sources import Conv2dSame, Partial_conv3, timm, torchvision


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(7, 9), (8, 8), (15, 6)])
@pytest.mark.parametrize("cls", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize(
    ("out", "kernel", "stride", "padding"), [(6, 3, 2, 1), (6, 5, 2, 2), (12, 3, 1, 1), (18, 2, 3, 0)]
)
def test_strides_and_multipliers(
    out: int,
    kernel: int,
    stride: int,
    padding: int,
    cls: type[nn.Conv2d],
    size: tuple[int, int],
    layout: torch.memory_format,
    backend: str,
    device: str,
) -> None:
    conv = cls(6, out, kernel, stride, padding, groups=6).to(device)
    fast = copy.deepcopy(conv)
    assert len(convblocks.accelerate(fast, strict=True).replaced) == 1
    x = torch.randn(2, 6, *size, device=device).to(memory_format=layout)
    torch.testing.assert_close(fast(x), conv(x))
    torch.testing.assert_close(fast(x[0]), conv(x[0]))  # (C, H, W)


def test_dense_and_grouped_convolutions_are_no_candidates() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(1, 4, 3), convblocks.DepthwiseConv2d(6)
    )
    assert convblocks.accelerate(model).entries == []


@pytest.mark.parametrize("padding_mode", ["reflect", "circular", "replicate"])
def test_other_paddings_are_refused(padding_mode: str) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode=padding_mode)  # type: ignore[arg-type]
    (entry,) = convblocks.accelerate(conv).entries
    assert entry.reason == f"its padding mode is {padding_mode}"


def test_changes_after_it(backend: str, device: str) -> None:
    """Of the attributes that torch reads at each call, and of the parameters."""
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4).to(device)
    fast = copy.deepcopy(conv)
    convblocks.accelerate(fast, strict=True)
    x = torch.randn(2, 4, 9, 8, device=device)
    for module in (conv, fast):  # as segmentation networks dilate the last stages of an encoder
        module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
    torch.testing.assert_close(fast(x), conv(x))
    for module in (conv, fast):
        module.register_parameter("bias", None)
    torch.testing.assert_close(fast(x), conv(x))
    for module in (conv, fast):
        prune.l1_unstructured(module, "weight", amount=0.5)
    torch.testing.assert_close(fast(x), conv(x))


def test_errors_stay_those_of_torch() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4)
    fast = copy.deepcopy(conv)
    convblocks.accelerate(fast, strict=True)
    for module in (conv, fast):
        with pytest.raises(RuntimeError, match=r"should be the same|expected scalar type"):
            module(torch.randn(1, 4, 5, 5).double())


@pytest.mark.parametrize("way", ["forward_split_cat", "forward_slicing"])
def test_partial_convolution_comes_back_as_it_was(way: str) -> None:
    block = Partial_conv3(8, 4, way.removeprefix("forward_"))
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        y = block(x)
    convblocks.accelerate(block, strict=True)
    assert "forward" not in block.__dict__
    twin = copy.deepcopy(block)
    for module in (block, twin):
        torch.testing.assert_close(module(x), y)
        convblocks.revert(module)
        assert type(module) is Partial_conv3
        assert module.forward == getattr(module, way)
        with torch.no_grad():
            assert torch.equal(module(x), y)


def test_partial_convolution_with_a_forward_of_its_own_is_refused() -> None:
    block = Partial_conv3(8, 4, "slicing")
    block.forward = lambda x: x
    (entry,) = convblocks.accelerate(block).entries
    assert entry.reason == "the forward of the module is not one of its class"


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "count"), [("mobilenet_v2", 17), ("tf_efficientnet_b0", 16), ("fasternet_t0", 13), ("convnext_atto", 12)]
)
def test_networks(name: str, count: int, train: bool, backend: str, device: str) -> None:
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.0} if name == "convnext_atto" else {}
    model = (
        torchvision.models.mobilenet_v2(dropout=0.0) if name == "mobilenet_v2" else timm.create_model(name, **options)
    )
    model = model.to(device).train(train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.randn(2, 3, 64, 64, device=device)
    before = model(x)
    grads = torch.autograd.grad(before.square().mean(), list(model.parameters()))
    report = convblocks.accelerate(model, strict=True)
    assert sum(e.operation in ("depthwise_conv2d", "partial_conv2d") for e in report.replaced) == count
    after = model(x)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * before.abs().max().item())
    for a, b in zip(torch.autograd.grad(after.square().mean(), list(model.parameters())), grads, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-6
