"""Res2Net against timm's, whose keys are the authors'."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks import Res2NetBottleneck
from convblocks.models import create
from convblocks.models.resnet import ResNet
from tests.models.common import assert_same, parameters, randomised

IMAGES = (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "res2net50_26w_4s": 25_699_120,
        "res2net50_26w_6s": 37_051_448,
        "res2net50_26w_8s": 48_403_776,
        "res2net50_48w_2s": 25_287_304,
        "res2net50_14w_8s": 25_059_816,
        "res2net101_26w_4s": 45_206_688,
        "res2net50d": 25_718_352,
        "res2net101d": 45_225_920,
        "res2next50": 24_671_464,
    }.items(),
)
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d", "res2next50"])
def test_is_timms(name: str) -> None:
    """One block of each kind in a stage stands for the network: the others repeat them."""
    options: dict[str, Any] = {"layers": (2, 2, 1, 1), "num_classes": 10}
    theirs = randomised(lambda: timm.create_model(name, **options))
    assert_same(create(name, **options), theirs, "timm", torch.randn(*IMAGES))


def test_dilated_is_timms() -> None:
    theirs = randomised(lambda: timm.create_model("res2net50_48w_2s", output_stride=8, layers=(1, 1, 1, 2)))
    ours = create("res2net50_48w_2s", dilated=(False, True, True), layers=(1, 1, 1, 2))
    assert_same(ours, theirs, "timm", torch.randn(2, 3, 40, 40))


def test_attention_is_timms() -> None:
    theirs = randomised(
        lambda: timm.create_model(
            "res2net50_26w_4s", layers=(1, 2, 1, 1), block_args={"scale": 4, "attn_layer": timm.layers.EcaModule}
        )
    )
    ours = create("res2net50_26w_4s", layers=(1, 2, 1, 1), attention="eca")
    assert_same(ours, theirs, "timm", torch.randn(*IMAGES))


def test_multiply_accumulates() -> None:
    counts = []
    with torch.device("meta"), convblocks.use_backend("reference"):
        x = torch.empty(1, 3, 224, 224)
        for make in (create, timm.create_model):
            with FlopCounterMode(display=False) as counter:
                make("res2net50_26w_4s").eval()(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert round(counts[0] / 2e9, 3) == 4.255


@pytest.mark.parametrize(
    ("options", "kind", "scale"),
    [
        ({}, "normal", 4),
        ({"kind": "stage"}, "stage", 4),
        ({"stride": 2, "downsample": nn.AvgPool2d(2)}, "stage", 4),
        ({"scale": 1}, "normal", 1),
        ({"scale": 2, "kind": "normal", "downsample": nn.Identity()}, "normal", 2),
        ({"attention": "se", "attention_at": "middle"}, "normal", 4),
        ({"groups": 2, "base_width": 16, "dilation": 2}, "normal", 4),
    ],
)
def test_block_is_its_formula(options: dict[str, Any], kind: str, scale: int) -> None:
    block: Any = randomised(lambda: Res2NetBottleneck(64, 16, **options)).double().eval()
    assert block.kind == kind
    x = torch.randn(2, 64, 8, 6, dtype=torch.float64)
    parts = torch.relu(nn.functional.batch_norm(block.conv1(x), **_statistics(block.bn1))).chunk(scale, 1)
    made: list[torch.Tensor] = []
    for i in range(max(1, scale - 1)):
        part = parts[i] if i == 0 or kind == "stage" else parts[i] + made[-1]
        made.append(torch.relu(nn.functional.batch_norm(block.convs[i](part), **_statistics(block.bns[i]))))
    if scale > 1:
        last = nn.functional.avg_pool2d(parts[-1], 3, options.get("stride", 1), 1)
        made.append(last if kind == "stage" else parts[-1])
    y = torch.cat(made, 1)
    y = y if block.middle is None else block.middle(y)
    y = nn.functional.batch_norm(block.conv3(y), **_statistics(block.bn3))
    expected = torch.relu(y + (x if block.downsample is None else block.downsample(x)))
    torch.testing.assert_close(block(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


def _statistics(norm: nn.BatchNorm2d) -> dict[str, Any]:
    return {
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "weight": norm.weight,
        "bias": norm.bias,
        "eps": norm.eps,
    }


def test_zero_init_last_and_drop_path() -> None:
    model = ResNet(Res2NetBottleneck, (1, 1, 1, 1), num_classes=4, zero_init_last=True, drop_path_rate=0.3)
    blocks = [m for m in model.modules() if isinstance(m, Res2NetBottleneck)]
    assert all((block.bn3.weight == 0).all() for block in blocks)
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all((norm.weight == 1).all() for block in blocks for norm in (block.bn1, *block.bns))


def test_exports() -> None:
    model = create("res2net50_26w_4s", layers=(1, 1, 1, 1), num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="Res2NetBottleneck: expected kind to be one of normal, stage, got other"):
        Res2NetBottleneck(64, 16, kind="other")
    with pytest.raises(ValueError, match="Res2NetBottleneck: expected a stride of 1 in a normal block, got 2"):
        Res2NetBottleneck(64, 16, 2, kind="normal")
    with pytest.raises(ValueError, match="Res2NetBottleneck: expected scale to be a positive integer, got 0"):
        Res2NetBottleneck(64, 16, scale=0)
    with pytest.raises(ValueError, match="Res2NetBottleneck: expected the width to be a positive integer, got 0"):
        Res2NetBottleneck(64, 1, base_width=26)
