"""What holds for every network: names, options, images, messages."""

from __future__ import annotations

import pickle
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn

import convblocks
from convblocks.models import create, names
from convblocks.models.network import SegmentationNetwork
from convblocks.models.registry import ENTRIES

# The first of each class, which stands for the others where layers run for real.
FIRST = list({entry.cls: name for name, entry in reversed(ENTRIES.items())}.values())


def _meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, **options).eval()


@pytest.mark.parametrize("name", names())
def test_classes_of_images(name: str) -> None:
    """Sizes only: of the published image size, and of the least."""
    entry = ENTRIES[name]
    model = _meta(name, in_channels=4, num_classes=7)
    for size in (entry.image_size, model.least_size):
        assert model(torch.empty(2, 4, size, size, device="meta")).shape[:2] == (2, 7)


@pytest.mark.parametrize("name", FIRST)
def test_features(name: str) -> None:
    """The maps at the ends of the stages; the last is what the head gets."""
    model, whole = create(name, features_only=True).eval(), create(name).eval()
    model.load_state_dict(whole.state_dict(), strict=False)
    assert not [key for key in model.state_dict() if key.split(".")[0] in whole.head_layers]
    x = torch.randn(1, 3, max(64, whole.least_size), max(64, whole.least_size))
    with torch.inference_mode():
        maps = model(x)
        assert len(maps) == len(whole.trunk())
        torch.testing.assert_close(maps[-1], whole.forward_features(x))
        classes = (
            whole.decode(maps, *x.shape[2:]) if isinstance(whole, SegmentationNetwork) else whole.forward_head(maps[-1])
        )
        expected = whole(x)  # in another layout inside, where convolutions add up in another order
        torch.testing.assert_close(classes, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    channels, reductions = zip(*whole.feature_info(), strict=True)
    assert list(channels) == [m.shape[1] for m in maps]
    assert [r.bit_count() for r in reductions] == [1] * len(maps)
    assert sorted(reductions) == list(reductions)


@pytest.mark.parametrize("name", FIRST)
def test_pooled_features(name: str) -> None:
    model = _meta(name, num_classes=0)
    size = ENTRIES[name].image_size
    assert model(torch.empty(2, 3, size, size, device="meta")).shape[0] == 2


@pytest.mark.parametrize("name", FIRST)
def test_refuses_other_images(name: str) -> None:
    model = _meta(name)
    for size in ([2, 4, 224, 224], [3, 224, 224]):
        with pytest.raises(ValueError, match=rf"{name}: expected images of size \(N, 3, H, W\), got"):
            model(torch.empty(size, device="meta"))
    if model.least_size > 1:
        small = model.least_size - 1
        with pytest.raises(ValueError, match=rf"{name}: expected images of at least {small + 1} x {small + 1} pixels"):
            model(torch.empty(1, 3, 512, small, device="meta"))


@pytest.mark.parametrize("name", FIRST)
def test_refuses_options(name: str) -> None:
    for option in ("num_classes", "in_channels"):
        with pytest.raises(ValueError, match=f"expected {option} to be a positive integer, got -1"):
            create(name, **{option: -1})
    with pytest.raises(TypeError, match="colour"):
        create(name, colour="red")


def test_names() -> None:
    no_name: Any = None
    assert create("resnet18", num_classes=2).name == "resnet18"
    assert names("wide_resnet50") == ["wide_resnet50_2"]
    assert set(names()) <= set(dir(convblocks.models))
    for name in names():  # no file has the name of a network
        assert getattr(convblocks.models, name).__name__ == name
        assert f"convblocks.models.{name}" not in sys.modules
    with pytest.raises(ValueError, match=r"create: expected the name of a network, got 'resnet5': is it resnet50"):
        create("resnet5")
    with pytest.raises(TypeError, match="create: expected the name of a network, got None"):
        create(no_name)
    with pytest.raises(AttributeError, match="expected the name of a network, got 'resnet5': is it resnet50"):
        _ = convblocks.models.resnet5
    assert pickle.loads(pickle.dumps(convblocks.models.resnet18)) is convblocks.models.resnet18


@pytest.mark.parametrize("rate", [-0.1, 1, float("nan"), "half", None])
@pytest.mark.parametrize("option", ["drop_rate", "drop_path_rate"])
def test_rates_are_below_one(option: str, rate: Any) -> None:
    words = f"darknet53: expected {option} to be a number from 0 to below 1, got {rate!r}"
    with pytest.raises(ValueError, match=re.escape(words)):
        create("darknet53", **{option: rate})


def test_attention_is_a_name_or_makes_a_module() -> None:
    model = create("resnet18", attention=lambda channels: convblocks.SCSE(channels, 2))
    assert len([m for m in model.modules() if isinstance(m, convblocks.SCSE)]) == 8
    with pytest.raises(ValueError, match=r"BasicBlock: expected attention to be one of se, ese, eca.*, got sea"):
        create("resnet18", attention="sea")
    with pytest.raises(TypeError, match="BasicBlock: expected attention to be a name or what makes a module"):
        create("resnet18", attention=convblocks.SCSE(64))
    with pytest.raises(ValueError, match="expected attention_at to be one of end, middle, got start"):
        create("resnet18", attention="se", attention_at="start")


def test_another_networks_weights_are_refused() -> None:
    sd = create("resnet18").state_dict()
    with pytest.raises(ValueError, match=r"convert_state_dict: expected the state dict of a ResNet, got .* more"):
        convblocks.convert_state_dict(sd, model=create("resnet50"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 3 else ()) for i, name in enumerate(FIRST)]
)
def test_copies_and_compiles(name: str) -> None:
    """One graph, exported; the results are those of the module, in float64, as torch's convolutions round, too."""
    model = create(name, num_classes=5).eval().double()
    size = max(64, model.least_size)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    exported = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(x), model(x))
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))


def test_symbolic_trace_and_vmap() -> None:
    for name in ("resnet18", "mobilenet_v2", "fasternet_t0"):
        model = create(name, num_classes=5).eval()
        x = torch.randn(2, 3, 96, 96)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
            got = torch.func.vmap(model)(x[None])[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fasternet_t0", "shufflenet_v1", "unet", "res2net50_26w_4s", "deeplabv3_resnet50"])
def test_symbolic_trace_for_training_and_inference(name: str) -> None:
    """In float64, in which rounding hides nothing."""
    model = create(name, num_classes=5).double().eval()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize("name", FIRST)
def test_any_attention(name: str) -> None:
    """Each class has places for it."""
    model = _meta(name, attention="sse")
    assert [m for m in model.modules() if isinstance(m, convblocks.SpatialSE)]
    with pytest.raises(ValueError, match=r"expected attention to be one of se, ese, eca.*, got sea"):
        _meta(name, attention="sea")
