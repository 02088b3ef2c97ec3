"""VGG against torchvision's and timm's."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, macs, parameters, randomised


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "vgg11": 132_863_336,
        "vgg13": 133_047_848,
        "vgg16": 138_357_544,
        "vgg19": 143_667_240,
        "vgg11_bn": 132_868_840,
        "vgg13_bn": 133_053_736,
        "vgg16_bn": 138_365_992,
        "vgg19_bn": 143_678_248,
    }.items(),
)
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


def test_parameters_without_bias() -> None:
    assert parameters("vgg16_bn", bias=False) == 138_361_768


@pytest.mark.parametrize(("name", "count"), [("vgg11", 7.609), ("vgg13", 11.308), ("vgg16", 15.470), ("vgg19", 19.632)])
def test_macs(name: str, count: float) -> None:
    assert macs(name) == pytest.approx(count, abs=5e-4)


def _torchvisions(name: str) -> nn.Module:
    """With few parameters in its linear layers: there would be 120 million."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=10, dropout=0.0, init_weights=False)
    model.classifier[0] = nn.Linear(25088, 16)
    model.classifier[3] = nn.Linear(16, 16)
    model.classifier[6] = nn.Linear(16, 10)
    model.features.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None)
    return model


@pytest.mark.parametrize(("name", "size"), [("vgg11", 32), ("vgg11_bn", 64)])
def test_is_torchvisions(name: str, size: int) -> None:
    theirs = randomised(lambda: _torchvisions(name))
    ours = create(name, num_classes=10, hidden=16, drop_rate=0.0)
    assert_same(ours, theirs, "torchvision", torch.randn(2, 3, size, size))


def _timms() -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model("vgg11_bn")
    model.pre_logits = timm.models.vgg.ConvMlp(512, 16, drop_rate=0.0)
    model.head.fc = nn.Linear(16, 10)
    model.features.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None)
    return model


def test_is_timms() -> None:
    ours = create("vgg11_bn", num_classes=10, hidden=16, drop_rate=0.0)
    assert_same(ours, randomised(_timms), "timm", torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("norm", [True, False])
def test_reads_pytorchcvs_weights(norm: bool) -> None:
    """Its units are those of the stages in turn."""
    with torch.device("meta"):
        ours = create("vgg13", norm=norm, bias=not norm, hidden=8)
    expected = ours.state_dict()
    theirs = {"classifier.0": "output.fc1.fc", "classifier.3": "output.fc2.fc", "classifier.6": "output.fc3"}
    layers = [f"features.{i}" for i, m in enumerate(ours.features) if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for stage in range(1, 6):
        for unit in (1, 2):
            for name in ("conv", "bn") if norm else ("conv",):
                theirs[layers.pop(0)] = f"features.stage{stage}.unit{unit}.{name}"
    sd = {f"{theirs[layer]}.{name}": expected[key] for key in expected for layer, _, name in [key.rpartition(".")]}
    for source in ("pytorchcv", None):
        converted = convblocks.convert_state_dict(sd, source, ours)
        assert converted.keys() == expected.keys()
        assert all(converted[key] is expected[key] for key in expected)


def test_attention_leaves_the_keys_as_they_are() -> None:
    plain, attended = (create("vgg11_bn", hidden=4, attention=attention) for attention in (None, "se"))
    keys = attended.state_dict().keys()
    assert keys > plain.state_dict().keys()
    assert {key.split(".")[1] for key in keys - plain.state_dict().keys()} == {f"se{i}" for i in range(1, 6)}
    for stage, width in zip(attended.trunk(), (64, 128, 256, 512, 512), strict=False):
        assert isinstance(stage[-1], convblocks.SqueezeExcite)
        assert stage[-1].fc1.in_channels == width


def test_features_are_those_before_each_pool() -> None:
    maps = create("vgg11", hidden=4, features_only=True)(torch.randn(1, 3, 64, 64))
    assert [list(m.shape[1:]) for m in maps] == [
        [64, 64, 64],
        [128, 32, 32],
        [256, 16, 16],
        [512, 8, 8],
        [512, 4, 4],
        [512, 2, 2],
    ]


def test_pooled_features_are_those_before_the_last_layer() -> None:
    assert create("vgg11", hidden=4, num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_a_blocks_keys_count_the_activations() -> None:
    assert list(convblocks.VGGBlock(3, 4, 2).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [name for name, _ in convblocks.VGGBlock(3, 4, 1, norm=True, attention="eca").named_children()] == [
        "0",
        "1",
        "2",
        "se",
        "3",
    ]


def test_refuses_numbers() -> None:
    for position, name in enumerate(("in_channels", "out_channels", "layers")):
        numbers = [4, 4, 4]
        numbers[position] = 0
        with pytest.raises(ValueError, match=f"VGGBlock: expected {name} to be a positive integer, got 0"):
            convblocks.VGGBlock(*numbers)
    with pytest.raises(ValueError, match="VGG: expected hidden to be a positive integer, got 0"):
        create("vgg11", hidden=0)
    with pytest.raises(ValueError, match="VGGBlock: expected attention to be one of"):
        create("vgg11", attention="sea")
