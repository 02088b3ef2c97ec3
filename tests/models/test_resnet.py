"""ResNet and its like against torchvision's and timm's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised

IMAGES = (2, 3, 64, 64)
LEGACY: dict[str, Any] = {
    "ceil_pool": True,
    "stride_first": True,
    "attention": partial(convblocks.SqueezeExcite, rd_divisor=1),
}


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "resnet18": 11_689_512,
        "resnet34": 21_797_672,
        "resnet50": 25_557_032,
        "resnet101": 44_549_160,
        "resnet152": 60_192_808,
        "wide_resnet50_2": 68_883_240,
        "wide_resnet101_2": 126_886_696,
        "resnext50_32x4d": 25_028_904,
        "resnext101_32x4d": 44_177_704,
        "resnext101_32x8d": 88_791_336,
        "resnext101_64x4d": 83_455_272,
        "se_resnet18": 11_779_624,
        "se_resnet34": 21_960_416,
        "se_resnet50": 28_088_024,
        "se_resnet101": 49_326_872,
        "se_resnet152": 66_821_848,
        "cbam_resnet18": 11_779_392,
        "cbam_resnet34": 21_960_468,
        "cbam_resnet50": 28_089_624,
        "cbam_resnet101": 49_330_172,
        "cbam_resnet152": 66_826_848,
        "eca_resnet50": 25_557_118,
        "simam_resnet50": 25_557_032,
    }.items(),
)
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_is_torchvisions(name: str) -> None:
    theirs = randomised(getattr(torchvision.models, name))
    assert_same(create(name), theirs, "torchvision", torch.randn(*IMAGES))


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("resnet50", "resnet50d", {"deep_stem": (32, 32), "avg_down": True}),
        ("se_resnet18", "seresnet18", {}),
        ("se_resnet50", "seresnet50", {}),
        ("eca_resnet50", "ecaresnet50d", {"deep_stem": (32, 32), "avg_down": True}),
        ("se_resnet50", "legacy_seresnet50", LEGACY),
    ],
)
def test_is_timms(name: str, theirs: str, options: dict[str, Any]) -> None:
    assert_same(
        create(name, **options),
        randomised(lambda: timm.create_model(theirs, drop_rate=0.0)),
        "timm",
        torch.randn(*IMAGES),
    )


def test_unpadded_pooling_needs_three_pixels() -> None:
    model = create("se_resnet50", **LEGACY).eval()
    assert model(torch.randn(1, 3, 3, 4)).shape == (1, 1000)
    with pytest.raises(ValueError, match="se_resnet50: expected images of at least 3 x 3 pixels, got 3 x 2"):
        model(torch.randn(1, 3, 3, 2))


def test_dilated_is_torchvisions() -> None:
    """As DeepLab's backbone is."""
    dilated = (False, True, True)
    theirs = randomised(lambda: torchvision.models.resnet50(replace_stride_with_dilation=dilated))
    assert_same(create("resnet50", dilated=dilated), theirs, "torchvision", torch.randn(*IMAGES))


def test_drop_path() -> None:
    """A sample skips blocks in training and none in evaluation."""
    model = create("resnet18", drop_path_rate=0.9, num_classes=4)
    assert [block.drop_path for stage in (model.layer1, model.layer4) for block in stage] == pytest.approx(
        [0.0, 0.9 / 7, 0.9 * 6 / 7, 0.9]
    )
    x = torch.randn(*IMAGES)
    assert not torch.equal(model(x), model(x))
    plain = create("resnet18", num_classes=4)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_global_context_at_the_authors_places() -> None:
    """After the last norm of all blocks but those of the first stage; 2 C R weights, 3 R + C biases and factors of the
    transform, C + 1 of the attention."""
    blocks = [(512, 4), (1024, 6), (2048, 3)]
    added = sum(n * (2 * c * (c // 16) + 3 * (c // 16) + 2 * c + 1) for c, n in blocks)
    assert parameters("gc_resnet50") == 25_557_032 + added
    model = create("gc_resnet18", num_classes=3)
    assert [n for n, m in model.named_modules() if isinstance(m, convblocks.GlobalContext)] == [
        f"layer{stage}.{i}.se" for stage in (2, 3, 4) for i in (0, 1)
    ]
    theirs = {}
    for key, value in model.state_dict().items():
        key = key.replace(".se.conv_attn.", ".context_block.conv_mask.")
        for ours, index in (("fc1", "0"), ("norm", "1"), ("fc2", "3")):
            key = key.replace(f".se.mlp_add.{ours}.", f".context_block.channel_add_conv.{index}.")
        norm = "channel_add_conv.1." in key
        theirs[key] = value[:, None, None] if norm else value
    assert "layer2.0.context_block.channel_add_conv.1.weight" in theirs
    converted = convblocks.convert_state_dict(theirs, "official", model)
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
