"""DenseNet against torchvision's and timm's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised

IMAGES = (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "densenet121": 7_978_856,
        "densenet161": 28_681_000,
        "densenet169": 14_149_480,
        "densenet201": 20_013_928,
    }.items(),
)
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


def test_is_torchvisions() -> None:
    theirs = randomised(lambda: torchvision.models.densenet121(num_classes=10))
    assert_same(create("densenet121", num_classes=10), theirs, "torchvision", torch.randn(*IMAGES))


def _small() -> Any:
    return convblocks.models.densenet.DenseNet(layers=(2, 3), growth_rate=12, num_classes=10)


def test_is_timms() -> None:
    theirs = randomised(
        lambda: timm.models.densenet.DenseNet(growth_rate=12, block_config=(2, 3), bn_size=4, num_classes=10)
    )
    assert_same(_small(), theirs, "timm", torch.randn(*IMAGES))


def test_reads_torchvisions_released_weights() -> None:
    """Their layers are called norm.1 and conv.1."""
    sd = create("densenet121").state_dict()
    released = {}
    for key, value in sd.items():
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            key = key.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.") if ".denselayer" in key else key
        released[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in released
    for source in ("torchvision", None):
        assert convblocks.convert_state_dict(released, source, create("densenet121")).keys() == sd.keys()


def test_multiply_accumulates() -> None:
    counts = []
    with torch.device("meta"), convblocks.use_backend("reference"):
        x = torch.empty(1, 3, 224, 224)
        for model in (create("densenet121"), torchvision.models.densenet121()):
            with FlopCounterMode(display=False) as counter:
                model.eval()(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert round(counts[0] / 2e9, 3) == 2.834


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inference_is_evaluation(memory_format: torch.memory_format) -> None:
    """One map for all layers, and the pooling first: the same numbers, in the same memory format."""
    model = randomised(_small).double().eval()
    block = model.features.denseblock1
    x = torch.randn(2, 24, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    y = block(x)
    with torch.no_grad():
        got = block(x)
    assert got.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(got, y)
    image = torch.randn(IMAGES, dtype=torch.float64).contiguous(memory_format=memory_format)
    y = model(image)
    with torch.no_grad():
        torch.testing.assert_close(model(image), y)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model.float()(image.float())).all()


def test_layers_options() -> None:
    x = torch.randn(2, 16, 6, 6)
    plain = convblocks.DenseLayer(16, 12, bn_size=0)
    assert [name for name, _ in plain.named_children()] == ["norm1", "conv1"]
    expected = torch.nn.functional.conv2d(plain.norm1(x), plain.conv1.weight, padding=1)
    torch.testing.assert_close(plain(x), expected)

    attended = convblocks.DenseLayer(16, 32, attention="se").eval()
    layer = convblocks.DenseLayer(16, 32).eval()
    layer.load_state_dict(attended.state_dict(), strict=False)
    torch.testing.assert_close(attended(x), attended.se(layer(x)))

    dropped = convblocks.DenseLayer(16, 12, drop_rate=0.5)
    assert 0.3 < (dropped(x) == 0).float().mean() < 0.7
    assert (dropped.eval()(x) != 0).all()
    assert create("densenet121", layer_drop_rate=0.2).features.denseblock1.denselayer1.drop_rate == 0.2


def test_attention_of_each_layer() -> None:
    model = create("densenet121", attention="eca", num_classes=4).eval()
    assert len([m for m in model.modules() if isinstance(m, convblocks.ECA)]) == 6 + 12 + 24 + 16
    x = torch.randn(IMAGES)
    y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y.detach(), rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="DenseLayer: expected growth_rate to be a positive integer, got 0"):
        convblocks.DenseLayer(16, 0)
    with pytest.raises(ValueError, match="DenseLayer: expected bn_size to be a positive integer, got -1"):
        convblocks.DenseLayer(16, 12, -1)
    with pytest.raises(ValueError, match="DenseLayer: expected drop_rate from 0 to below 1, got 1"):
        convblocks.DenseLayer(16, 12, drop_rate=1.0)
    with pytest.raises(ValueError, match=r"DenseLayer: expected attention to be one of se, .*, got sea"):
        convblocks.DenseBlock(16, 2, attention="sea")
    with pytest.raises(ValueError, match="DenseBlock: expected layers to be a positive integer, got 0"):
        convblocks.DenseBlock(16, 0)
    with pytest.raises(ValueError, match="Transition: expected out_channels to be a positive integer, got 0"):
        convblocks.Transition(1)
