"""ShuffleNet V2 against torchvision's, V1 against its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised, without_rounding


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("shufflenet_v2_x0_5", {}, 1_366_792),
        ("shufflenet_v2_x1_0", {}, 2_278_604),
        ("shufflenet_v2_x1_5", {}, 3_503_624),
        ("shufflenet_v2_x2_0", {}, 7_393_996),
        ("shufflenet_v1", {}, 1_864_728),
        ("shufflenet_v1", {"width": 0.5}, 717_324),
        ("shufflenet_v1", {"width": 1.5}, 3_441_168),
        ("shufflenet_v1", {"width": 2.0}, 5_449_776),
        ("shufflenet_v1", {"groups": 8, "width": 0.5}, 1_010_448),
        ("shufflenet_v1", {"groups": 8}, 2_433_768),
        ("shufflenet_v1", {"groups": 8, "width": 1.5}, 4_268_952),
        ("shufflenet_v1", {"groups": 8, "width": 2.0}, 6_521_232),
        ("shufflenet_v1", {"groups": 1}, 1_531_936 - 1000),  # pytorchcv's, whose classifier has a bias
        ("shufflenet_v1", {"groups": 2}, 1_733_848 - 1000),
        ("shufflenet_v1", {"groups": 4}, 1_968_344 - 1000),
    ],
)
def test_parameters(name: str, options: dict[str, Any], count: int) -> None:
    assert parameters(name, **options) == count


def test_is_torchvisions() -> None:
    theirs = without_rounding(randomised(lambda: torchvision.models.shufflenet_v2_x0_5()))
    ours = without_rounding(create("shufflenet_v2_x0_5"))
    assert_same(ours, theirs, "torchvision", torch.randn(2, 3, 64, 64))


def test_output_is_torchvisions() -> None:
    theirs = randomised(lambda: torchvision.models.shufflenet_v2_x1_0()).eval()
    ours = create("shufflenet_v2_x1_0").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "thousand_millions"), [("shufflenet_v2_x0_5", "0.040"), ("shufflenet_v2_x1_0", "0.145")]
)
def test_multiply_accumulates(name: str, thousand_millions: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, convblocks.use_backend("reference"):
        create(name).eval()(torch.empty(1, 3, 224, 224))
    assert f"{counter.get_total_flops() / 2e9:.3f}" == thousand_millions


def test_reads_pytorchcvs() -> None:
    """Keys as pytorchcv's networks have them, with squeeze-excite, too."""
    ours = create("shufflenet_v2_x0_5", pool_padding=0, attention="se", num_classes=4)
    layers = {
        "branch2.0": "compress_conv1",
        "branch2.1": "compress_bn1",
        "branch2.3": "dw_conv2",
        "branch2.4": "dw_bn2",
        "branch2.5": "expand_conv3",
        "branch2.6": "expand_bn3",
        "branch1.0": "dw_conv4",
        "branch1.1": "dw_bn4",
        "branch1.2": "expand_conv5",
        "branch1.3": "expand_bn5",
        "se.fc1": "se.conv1",
        "se.fc2": "se.conv2",
    }
    others = {
        "conv1.0": "features.init_block.conv.conv",
        "conv1.1": "features.init_block.conv.bn",
        "conv5.0": "features.final_block.conv",
        "conv5.1": "features.final_block.bn",
        "fc": "output",
    }
    sd: dict[str, Tensor] = {}
    for key, value in ours.state_dict().items():
        host, _, name = key.rpartition(".")
        if host in others:
            sd[f"{others[host]}.{name}"] = value
        else:
            stage, unit, layer = host.split(".", 2)
            sd[f"features.stage{int(stage[-1]) - 1}.unit{int(unit) + 1}.{layers[layer]}.{name}"] = value
    for source in (None, "pytorchcv"):
        converted = convblocks.convert_state_dict(sd, source, ours)
        assert converted.keys() == ours.state_dict().keys()
        assert all(torch.equal(converted[key], value) for key, value in ours.state_dict().items())


def _v1(sd: dict[str, Tensor], x: Tensor, groups: int, paper: bool, train: bool) -> Tensor:
    """ShuffleNet V1 by its formulas, from a state dict of Megvii's keys."""

    def conv_norm(x: Tensor, conv: str, norm: str, **options: int) -> Tensor:
        x = F.conv2d(x, sd[f"{conv}.weight"], **options)
        mean, var = sd[f"{norm}.running_mean"].clone(), sd[f"{norm}.running_var"].clone()
        return F.batch_norm(x, mean, var, sd[f"{norm}.weight"], sd[f"{norm}.bias"], train)

    x = conv_norm(x, "first_conv.0", "first_conv.1", stride=2, padding=1).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i in range(16):
        unit, stride = f"features.{i}.branch_main_", 2 if i in (0, 4, 12) else 1
        y = conv_norm(x, f"{unit}1.0", f"{unit}1.1", groups=groups if i else 1).relu()
        mid = y.shape[1]
        if paper:
            y = F.channel_shuffle(y, groups)
        y = conv_norm(y, f"{unit}1.3", f"{unit}1.4", stride=stride, padding=1, groups=mid)
        if not paper:
            y = F.channel_shuffle(y, mid // groups)
        y = conv_norm(y, f"{unit}2.0", f"{unit}2.1", groups=groups)
        x = (x + y).relu() if stride == 1 else torch.cat((F.avg_pool2d(x, 3, 2, 1), y.relu()), 1)
    return F.linear(x.mean((2, 3)), sd["classifier.0.weight"])


@pytest.mark.parametrize(("groups", "width", "shuffle"), [(3, 0.5, "megvii"), (8, 0.5, "paper"), (1, 0.25, "megvii")])
def test_v1_by_its_formulas(groups: int, width: float, shuffle: str) -> None:
    options: dict[str, Any] = {"groups": groups, "width": width, "shuffle": shuffle}
    model = randomised(lambda: create("shufflenet_v1", num_classes=10, **options)).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for train in (False, True):
        sd = {k: t.clone() for k, t in model.state_dict().items()}
        parameter = "features.1.branch_main_1.0.weight"
        sd[parameter].requires_grad_()
        expected = _v1(sd, x, groups, shuffle == "paper", train)
        y = model.train(train)(x)
        torch.testing.assert_close(y, expected)
        expected.square().sum().backward()
        model.zero_grad()
        y.square().sum().backward()
        torch.testing.assert_close(model.get_parameter(parameter).grad, sd[parameter].grad)
    with torch.no_grad():
        y = model.float().eval()(x.float())
        expected = _v1(model.state_dict(), x.float(), groups, shuffle == "paper", False)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_in_units(stride: int) -> None:
    """At the end of V2's longer branch; in V1 after the last norm, before the activation."""
    x = torch.randn(2, 12, 6, 5)
    v2 = convblocks.ShuffleNetV2Unit(12, 12 * stride, stride, attention="eca")
    first, second = (v2.branch1(x), x) if stride == 2 else x.chunk(2, 1)
    expected = F.channel_shuffle(torch.cat((first, v2.se(v2.branch2(second))), 1), 2)
    torch.testing.assert_close(v2(x), expected)
    v1 = convblocks.ShuffleNetV1Unit(12, 12 * stride, 3, stride, attention="eca").eval()
    conv, norm, _, depthwise, last = v1.branch_main_1
    y = last(depthwise(F.channel_shuffle(norm(conv(x)), 3)))
    y = v1.se(v1.branch_main_2(y))
    expected = (x + y).relu() if stride == 1 else torch.cat((F.avg_pool2d(x, 3, 2, 1), y.relu()), 1)
    torch.testing.assert_close(v1(x), expected)


def test_drop_path() -> None:
    unit = convblocks.ShuffleNetV1Unit(12, 12, 3, drop_path=0.5)
    x = torch.rand(64, 12, 3, 3)
    assert 10 < sum(torch.equal(a, b) for a, b in zip(x, unit(x), strict=True)) < 54
    model = create("shufflenet_v1", width=0.5, drop_path_rate=0.5)
    drops = [unit.drop_path for unit in model.features]
    assert drops == pytest.approx([0.0 if i in (0, 4, 12) else 0.5 * i / 15 for i in range(16)])


def test_maps() -> None:
    assert create("shufflenet_v2_x0_5").feature_info() == [(24, 2), (24, 4), (48, 8), (96, 16), (1024, 32)]
    assert create("shufflenet_v1").feature_info() == [(24, 2), (24, 4), (240, 8), (480, 16), (960, 32)]


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1"])
def test_folds(name: str) -> None:
    """All norms go into the convolutions before them."""
    model = randomised(lambda: create(name, num_classes=3)).eval()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        report = convblocks.accelerate(model, fold_bn=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert sum(e.reason.endswith(" folded in") for e in report.replaced) == norms


def test_what_is_refused() -> None:
    refused: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (convblocks.ShuffleNetV2Unit, (8, 8), {"attention": "no"}, "Unit: expected attention to be one of .*, got no"),
        (convblocks.ShuffleNetV1Unit, (12, 12), {"attention": "no"}, "expected attention to be one of .*, got no"),
        (convblocks.ShuffleNetV1Unit, (12, 12), {"drop_path": 1.0}, "expected drop_path from 0 to below 1, got 1"),
        (convblocks.ShuffleNetV1Unit, (12, 24, 3, 2), {"drop_path": 0.1}, "expected drop_path of 0 with a stride of 2"),
        (create, ("shufflenet_v1",), {"groups": 5}, "ShuffleNetV1: expected groups to be one of 1, 2, 3, 4, 8, got 5"),
        (create, ("shufflenet_v1",), {"width": 0}, "ShuffleNetV1: expected a width above 0, got 0"),
        (create, ("shufflenet_v1",), {"shuffle": "no"}, "expected shuffle to be one of paper, megvii, got no"),
        (create, ("shufflenet_v2_x0_5",), {"widths": (48, 96)}, "ShuffleNetV2: expected 4 widths, got 2"),
        (create, ("shufflenet_v2_x0_5",), {"widths": (48, 96, 192, 0)}, "expected out_channels to be a positive"),
        (create, ("shufflenet_v2_x0_5",), {"pool_padding": 2}, "expected a pool_padding of 0 or 1, got 2"),
    ]
    for make, arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            make(*arguments, **options)
