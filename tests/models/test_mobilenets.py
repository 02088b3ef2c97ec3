"""MobileNets against torchvision's and timm's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import convblocks
from convblocks.models import create
from convblocks.models.summary import macs, meta
from tests.models.common import assert_same, parameters, randomised, without_rounding

IMAGES = (2, 3, 48, 48)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("mobilenet_v1", {}, 4_231_976),
        ("mobilenet_v2", {}, 3_504_872),
        ("mobilenet_v2", {"width": 0.35}, 1_677_128),
        ("mobilenet_v2", {"width": 0.5}, 1_968_680),
        ("mobilenet_v2", {"width": 0.75}, 2_636_424),
        ("mobilenet_v2", {"width": 1.4}, 6_108_776),
        ("mobilenet_v3_large", {}, 5_483_032),
        ("mobilenet_v3_small", {}, 2_542_856),
    ],
)
def test_parameters(name: str, options: dict[str, Any], count: int) -> None:
    assert parameters(name, **options) == count


@pytest.mark.parametrize(("name", "width"), [("mobilenet_v2", 0.35), ("mobilenet_v3_small", 1.0)])
def test_is_torchvisions(name: str, width: float) -> None:
    theirs = randomised(lambda: getattr(torchvision.models, name)(dropout=0.0, width_mult=width))
    ours = without_rounding(create(name, drop_rate=0.0, width=width))
    assert_same(ours, without_rounding(theirs), "torchvision", torch.randn(*IMAGES))


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("mobilenet_v1", "mobilenetv1_100", {}),
        ("mobilenet_v2", "mobilenetv2_050", {"width": 0.5}),
        ("mobilenet_v3_large", "mobilenetv3_large_100", {"norm_eps": 1e-5, "norm_momentum": 0.1}),
        ("mobilenet_v3_small", "mobilenetv3_small_100", {"norm_eps": 1e-5, "norm_momentum": 0.1}),
    ],
)
def test_is_timms(name: str, theirs: str, options: dict[str, Any]) -> None:
    ours = without_rounding(create(name, drop_rate=0.0, **options))
    assert_same(ours, without_rounding(randomised(lambda: timm.create_model(theirs))), "timm", torch.randn(*IMAGES))


def test_keys_of_timm_in_any_order() -> None:
    """As a file of safetensors gives them."""
    sd = timm.create_model("mobilenetv3_small_100").state_dict()
    model = create("mobilenet_v3_small")
    converted = convblocks.convert_state_dict(dict(sorted(sd.items())), model=model)
    assert converted.keys() == model.state_dict().keys()
    torch.testing.assert_close(
        converted["features.4.block.2.fc2.weight"], sd["blocks.2.0.se.conv_expand.weight"], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mobilenet_v1", 0.569), ("mobilenet_v2", 0.301), ("mobilenet_v3_large", 0.217), ("mobilenet_v3_small", 0.057)],
)
def test_published_multiply_accumulates(name: str, expected: float) -> None:
    assert macs(meta(name), 224) / 1e9 == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenet_v1", [64, 128, 256, 512, 1024]),
        ("mobilenet_v2", [16, 24, 32, 96, 1280]),
        ("mobilenet_v3_large", [16, 24, 40, 112, 960]),
        ("mobilenet_v3_small", [16, 16, 24, 48, 576]),
    ],
)
def test_maps(name: str, channels: list[int]) -> None:
    """One at each halving."""
    assert meta(name).feature_info() == list(zip(channels, (2, 4, 8, 16, 32), strict=True))


def test_attention() -> None:
    """After the depthwise convolution; where there is squeeze-excite, instead of it. No other key changes."""
    plain, attended = create("mobilenet_v2"), create("mobilenet_v2", attention="eca")
    assert len([m for m in attended.modules() if isinstance(m, convblocks.ECA)]) == 17
    assert {k for k in attended.state_dict() if ".se." not in k} == plain.state_dict().keys()
    v1 = create("mobilenet_v1", attention="cbam")
    assert len([m for m in v1.modules() if isinstance(m, convblocks.CBAM)]) == 13
    assert {k for k in v1.state_dict() if ".se." not in k} == create("mobilenet_v1").state_dict().keys()
    v3 = create("mobilenet_v3_large", attention="simam")
    assert len([m for m in v3.modules() if isinstance(m, convblocks.SimAM)]) == 8
    assert not [m for m in v3.modules() if isinstance(m, convblocks.SqueezeExcite)]
    assert not [m for m in create("mobilenet_v3_large", attention=None).modules() if "Squeeze" in type(m).__name__]


def test_drop_path() -> None:
    """It grows from 0 on, and leaves evaluation alone."""
    model = create("mobilenet_v3_small", drop_path_rate=0.5, drop_rate=0.0, num_classes=4)
    blocks = [m for m in model.modules() if isinstance(m, convblocks.InvertedResidual)]
    assert [block.drop_path for block in blocks] == pytest.approx([0.5 * i / 11 for i in range(11)])
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    plain = create("mobilenet_v3_small", num_classes=4)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_norms_and_first_values() -> None:
    """As published: eps 1e-3 and momentum 0.01 in V3; deviations of the linear layers."""
    usual, v3 = (1e-5, 0.1), (1e-3, 0.01)
    cut = 0.09 * 0.88  # what a normal distribution's is after it is cut off at two of it
    for name, expected, deviation in (
        ("mobilenet_v1", usual, cut),
        ("mobilenet_v2", usual, 0.01),
        ("mobilenet_v3_small", v3, 0.01),
    ):
        model = create(name)
        assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {expected}
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        for layer in linear:
            assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.02)
            assert not layer.bias.any()


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_folds(name: str) -> None:
    """Each norm, also those that add a residual."""
    model = create(name, num_classes=5).eval()
    norms = len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        report = convblocks.accelerate(model, fold_bn=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert len([m for m in model.modules() if type(m).__name__ == "FoldedOwnBatchNormAct2d"]) == norms, str(report)


def test_refuses_widths() -> None:
    for name, network in (
        ("mobilenet_v1", "MobileNetV1"),
        ("mobilenet_v2", "MobileNetV2"),
        ("mobilenet_v3_small", "MobileNetV3"),
    ):
        with pytest.raises(ValueError, match=f"{network}: expected a positive width, got -1"):
            create(name, width=-1)


def test_keys_of_pytorchcv() -> None:
    """Of mobilenetv2b, in which each unit has its own convolutions."""
    model = create("mobilenet_v2", num_classes=3)
    stages = [[(1, 1)], [(2, 2)], [(4, 3)], [(7, 4), (11, 3)], [(14, 3), (17, 1)]]  # of ours: the first, and how many
    theirs = {}
    for s, parts in enumerate(stages, 1):
        for u, k in enumerate((i for first, count in parts for i in range(first, first + count)), 1):
            conv = model.features[k].conv
            layers = (
                [conv[0][0], conv[0][1], conv[1][0], conv[1][1], conv[2], conv[3]] if k > 1 else [*conv[0], *conv[1:]]
            )
            for i, layer in enumerate(layers):
                name = f"features.stage{s}.unit{u}.conv{i // 2 + (1 if k > 1 else 2)}.{('conv', 'bn')[i % 2]}"
                theirs |= {f"{name}.{key}": t for key, t in layer.state_dict().items()}
    for name, block in (("init_block", model.features[0]), ("final_block", model.features[18])):
        for layer, module in zip(("conv", "bn"), block, strict=True):
            theirs |= {f"features.{name}.{layer}.{key}": t for key, t in module.state_dict().items()}
    theirs["output.weight"] = model.classifier[1].weight.detach()[:, :, None, None]
    converted = convblocks.convert_state_dict(theirs, model=model)
    for key, t in model.state_dict().items():
        assert torch.equal(converted[key], t), key
