"""DepthwiseConv2d, DepthwiseSeparableConv, PartialConv, FasterNetBlock and ShuffleNet's units against others' own."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convblocks
from tests.accelerate.sources import Conv2dSame, Partial_conv3, made, timm, torchvision

both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def _assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Output and gradients, in training and in evaluation, with the other's state dict."""
    made(lambda: theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for train in (True, False):
        results = []
        for module in (ours, theirs):
            a = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = module.train(train)(a)
            grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
            results.append([y, *torch.autograd.grad(y, [a, *module.parameters()], grad)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@both_layouts
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "stride": 2, "padding": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "out_channels": 12},
        *({"kernel_size": 3, "padding": (1, 2), "padding_mode": m} for m in ("reflect", "replicate", "circular")),
    ],
)
def test_depthwise_is_torchs(options: dict[str, Any], layout: torch.memory_format, backend: str, device: str) -> None:
    theirs = nn.Conv2d(6, **{"out_channels": 6, **options}, groups=6, dtype=torch.float64, device=device)
    ours = convblocks.DepthwiseConv2d(6, **options, dtype=torch.float64, device=device)
    assert isinstance(ours, nn.Conv2d)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, device=device).to(memory_format=layout)
    _assert_same(ours, theirs, x)
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), ours(x))


def test_depthwise_same_with_a_stride_is_timms(backend: str, device: str) -> None:
    options: dict[str, Any] = {"kernel_size": 3, "stride": 2, "dtype": torch.float64, "device": device}
    ours = convblocks.DepthwiseConv2d(6, padding="same", **options)
    assert "padding=same" in repr(ours)
    _assert_same(
        ours, Conv2dSame(6, 6, groups=6, **options), torch.randn(2, 6, 9, 8, dtype=torch.float64, device=device)
    )


@pytest.mark.parametrize(("act", "layer"), [("relu6", nn.ReLU6()), (nn.SiLU, nn.SiLU()), (nn.GELU(), nn.GELU())])
def test_depthwise_with_an_activation(act: Any, layer: nn.Module, backend: str, device: str) -> None:
    ours = convblocks.DepthwiseConv2d(6, padding=1, activation=act).to(device)
    theirs = nn.Conv2d(6, 6, 3, padding=1, groups=6).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 5, 7, device=device)
    torch.testing.assert_close(ours(x), layer(theirs(x)))


def _timm_depthwise_separable(**options: Any) -> nn.Module:
    block = timm.models._efficientnet_blocks.DepthwiseSeparableConv
    module: nn.Module = block(8, 12, act_layer=nn.ReLU6, pw_act=True, **options)
    return module


@both_layouts
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_separable_is_timms(stride: int, layout: torch.memory_format, backend: str, device: str) -> None:
    theirs = _timm_depthwise_separable(stride=stride, dw_kernel_size=5).double().to(device)
    ours = convblocks.DepthwiseSeparableConv(8, 12, 5, stride, dtype=torch.float64, device=device)
    _assert_same(ours, theirs, torch.randn(3, 8, 9, 7, dtype=torch.float64, device=device).to(memory_format=layout))


def test_depthwise_separable_has_attention_where_timms_has(backend: str, device: str) -> None:
    se = timm.models._efficientnet_blocks.SqueezeExcite
    theirs = made(lambda: _timm_depthwise_separable(se_layer=partial(se, rd_ratio=0.5))).double().to(device).eval()
    attention = partial(convblocks.SqueezeExcite, squeeze_channels=4, act_layer="relu6", dtype=torch.float64)
    ours = convblocks.DepthwiseSeparableConv(8, 12, attention=attention, dtype=torch.float64).to(device).eval()
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), "timm", ours))
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64, device=device)
    torch.testing.assert_close(ours(x), theirs(x))


def test_depthwise_separable_flavours(backend: str, device: str) -> None:
    x = torch.randn(2, 4, 7, 7, device=device)
    options: dict[str, Any] = {"pw_norm": False, "pw_act": "none", "device": device}
    xception = convblocks.DepthwiseSeparableConv(4, 6, dw_norm=False, dw_act="none", **options)
    assert xception.state_dict().keys() == {"conv_dw.weight", "conv_pw.weight"}
    expected = nn.functional.conv2d(x, xception.conv_dw.weight, None, 1, 1, 1, 4)
    torch.testing.assert_close(xception(x), nn.functional.conv2d(expected, xception.conv_pw.weight))
    fused = convblocks.DepthwiseSeparableConv(
        4, 4, dw_norm=False, dw_act="relu", depth_multiplier=2, skip=True, **options
    )
    expected = nn.functional.conv2d(x, fused.conv_dw.weight, None, 1, 1, 1, 4).relu()
    torch.testing.assert_close(fused(x), x + nn.functional.conv2d(expected, fused.conv_pw.weight))


@both_layouts
@pytest.mark.parametrize("way", ["split_cat", "slicing"])
def test_partial_conv_is_timms(way: str, layout: torch.memory_format, backend: str, device: str) -> None:
    ours = convblocks.PartialConv(10, 4, way, dtype=torch.float64, device=device)
    x = torch.randn(2, 10, 6, 5, dtype=torch.float64, device=device).to(memory_format=layout)
    before = x.clone()
    _assert_same(ours, Partial_conv3(10, 4, "split_cat").double().to(device), x)
    assert torch.equal(x, before)
    with torch.no_grad():
        y = ours(x)
        ours.inplace = True
        assert ours(x) is x
        torch.testing.assert_close(x, y)
    wanted = before.clone().requires_grad_()
    ours(wanted * 1).sum().backward()
    assert wanted.grad is not None


@both_layouts
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_fasternet_block_is_timms(scale: float, layout: torch.memory_format, backend: str, device: str) -> None:
    arguments = (12, 4, 2.0, 0.0, scale, nn.GELU)
    theirs = sys.modules[Partial_conv3.__module__].MLPBlock(*arguments).double().to(device)  # type: ignore[attr-defined]
    ours = convblocks.FasterNetBlock(*arguments, dtype=torch.float64, device=device)
    _assert_same(ours, theirs, torch.randn(2, 12, 6, 5, dtype=torch.float64, device=device).to(memory_format=layout))


def test_fasternet_drop_path() -> None:
    block = convblocks.FasterNetBlock(8, drop_path=0.5)
    x = torch.randn(64, 8, 3, 3)
    skipped = (block(x) - x).flatten(1).abs().amax(1) == 0
    assert 10 < int(skipped.sum()) < 54
    assert not ((block.eval()(x) - x).flatten(1).abs().amax(1) == 0).any()


@both_layouts
@pytest.mark.parametrize(("c", "out", "stride"), [(12, 12, 1), (10, 16, 2), (6, 6, 3)])
def test_shufflenet_v2_is_torchvisions(
    c: int, out: int, stride: int, layout: torch.memory_format, backend: str, device: str
) -> None:
    theirs = torchvision.models.shufflenetv2.InvertedResidual(c, out, stride).double().to(device)
    ours = convblocks.ShuffleNetV2Unit(c, out, stride, dtype=torch.float64, device=device)
    x = torch.randn(3, c, 8, 7, dtype=torch.float64, device=device).to(memory_format=layout)
    _assert_same(ours, theirs, x)
    assert ours(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shuffle", ["paper", "megvii"])
@pytest.mark.parametrize(("c", "out", "groups", "stride"), [(24, 24, 3, 1), (12, 24, 2, 2), (8, 8, 1, 1)])
def test_shufflenet_v1(c: int, out: int, groups: int, stride: int, shuffle: str, backend: str, device: str) -> None:
    """By the formulas, layer by layer."""
    unit = convblocks.ShuffleNetV1Unit(c, out, groups, stride, shuffle=shuffle, device=device).eval()
    made(lambda: unit)
    x = torch.randn(2, c, 7, 6, device=device)
    first, second = unit.branch_main_1, unit.branch_main_2
    y = first[:2](x)
    n, mid, h, w = y.shape
    if shuffle == "paper":
        y = y.view(n, groups, mid // groups, h, w).transpose(1, 2).reshape(n, mid, h, w)
        y = first[3:](y)
    else:
        y = first[3:](y)
        y = y.view(n, mid // groups, groups, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
    y = second[0](y)
    y = nn.functional.batch_norm(y, second[1].running_mean, second[1].running_var, second[1].weight, second[1].bias)
    pooled = nn.functional.avg_pool2d(x, 3, 2, 1)
    expected = (x + y).relu() if stride == 1 else torch.cat((pooled, y.relu()), 1)
    torch.testing.assert_close(unit(x), expected)
    assert expected.shape[1] == out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: convblocks.DepthwiseConv2d(6, groups=3), "expected groups to be in_channels, 6, got 3"),
        (lambda: convblocks.DepthwiseConv2d(6, activation="tanh"), "DepthwiseConv2d: expected activation to be one of"),
        (
            lambda: convblocks.DepthwiseConv2d(6, 6, 3, 2, "same", padding_mode="reflect"),
            "DepthwiseConv2d: expected padding_mode zeros for padding same, got reflect",
        ),
        (lambda: convblocks.DepthwiseSeparableConv(0, 6), "expected in_channels to be a positive"),
        (
            lambda: convblocks.DepthwiseSeparableConv(4, 6, attention="sea"),
            "DepthwiseSeparableConv: expected attention to be one of .*, got sea",
        ),
        (lambda: convblocks.PartialConv(8, 9), "PartialConv: expected n_div of at most 8, the channels, got 9"),
        (lambda: convblocks.PartialConv(8, 4, "cat"), "expected forward to be one of split_cat, slicing, got"),
        (lambda: convblocks.PartialConv(8, kernel_size=2), "PartialConv: expected an odd kernel_size, got 2"),
        (lambda: convblocks.FasterNetBlock(8, drop_path=1.0), "expected drop_path from 0 to below 1, got"),
        (lambda: convblocks.ShuffleNetV2Unit(8, 10), "out_channels equal to in_channels, 8, got 10"),
        (lambda: convblocks.ShuffleNetV2Unit(8, 9, 2), "expected an even number of out_channels, got 9"),
        (lambda: convblocks.ShuffleNetV2Unit(8, 8, 4), "ShuffleNetV2Unit: expected a stride of 1 to 3, got 4"),
        (lambda: convblocks.ShuffleNetV1Unit(24, 24, 5), "expected first_groups that divide in_channels, 24, got 5"),
        (lambda: convblocks.ShuffleNetV1Unit(24, 48), "expected out_channels of 24, as in_channels, got 48"),
        (lambda: convblocks.ShuffleNetV1Unit(24, 24, shuffle="no"), "shuffle to be one of paper, megvii, got no"),
    ],
)
def test_what_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
