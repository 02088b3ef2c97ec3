"""SqueezeNet and its block against torchvision's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, parameters


@pytest.mark.parametrize(("name", "count"), [("squeezenet1_0", 1_248_424), ("squeezenet1_1", 1_235_496)])
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_is_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(dropout=0)
    assert_same(create(name, drop_rate=0.0), theirs, "torchvision", torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(("name", "thousand_millions"), [("squeezenet1_0", "0.819"), ("squeezenet1_1", "0.349")])
def test_multiply_accumulates(name: str, thousand_millions: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, convblocks.use_backend("reference"):
        create(name).eval()(torch.empty(1, 3, 224, 224))
    assert f"{counter.get_total_flops() / 2e9:.3f}" == thousand_millions


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("squeezenet1_0", {(1, 1): 3, (1, 2): 4, (1, 3): 5, (2, 1): 7, (2, 2): 8, (2, 3): 9, (2, 4): 10, (3, 1): 12}),
        ("squeezenet1_1", {(1, 1): 3, (1, 2): 4, (2, 1): 6, (2, 2): 7, (3, 1): 9, (3, 2): 10, (3, 3): 11, (3, 4): 12}),
    ],
)
def test_reads_pytorchcvs(name: str, places: dict[tuple[int, int], int]) -> None:
    """Keys as pytorchcv's networks have them."""
    ours = create(name, num_classes=4)
    prefixes = {f"features.{i}.": f"features.stage{stage}.unit{unit}." for (stage, unit), i in places.items()}
    sd: dict[str, Tensor] = {}
    for key, value in ours.state_dict().items():
        host, _, name = key.rpartition(".")
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        if prefix:
            sd[f"{prefixes[prefix]}{host.removeprefix(prefix)}.conv.{name}"] = value
        else:
            sd[{"features.0": "features.init_block.conv", "classifier.1": "output.final_conv"}[host] + f".{name}"] = (
                value
            )
    assert len(sd) == len(ours.state_dict())
    for source in (None, "pytorchcv"):
        converted = convblocks.convert_state_dict(sd, source, ours)
        assert all(converted[key] is value for key, value in sd.items() if key in converted)
        ours.load_state_dict(converted, strict=True)


def test_least_size() -> None:
    for name, size in (("squeezenet1_0", 21), ("squeezenet1_1", 17)):
        theirs = getattr(torchvision.models, name)().eval()
        assert create(name).least_size == size
        theirs(torch.randn(1, 3, size, size))
        with pytest.raises(RuntimeError, match="too small"):
            theirs(torch.randn(1, 3, size - 1, size - 1))


def test_fire_is_torchvisions() -> None:
    theirs = torchvision.models.squeezenet.Fire(6, 3, 5, 4)
    ours = convblocks.Fire(6, 3, 5, 4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 6, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    bypass = convblocks.Fire(9, 3, 5, 4, bypass=True, drop_path=0.5)
    y = bypass(x := torch.randn(64, 9, 3, 3))
    assert 10 < sum(torch.equal(a, b) for a, b in zip(x, y, strict=True)) < 54
    assert sum(p.numel() for p in convblocks.Fire(64, 32, 64, 64).parameters()) == 22_688


def test_options() -> None:
    model = create("squeezenet1_1", attention="eca", bypass=True, drop_path_rate=0.5, num_classes=3)
    fires: list[Any] = [m for m in model.modules() if isinstance(m, convblocks.Fire)]
    assert [f.bypass for f in fires] == [False, True, False, True, False, True, False, True]
    assert [f.drop_path for f in fires] == pytest.approx([0, 0.5 / 7, 0, 1.5 / 7, 0, 2.5 / 7, 0, 0.5])
    assert all(isinstance(f.se, convblocks.ECA) for f in fires)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert model.feature_info() == [(64, 2), (128, 4), (256, 8), (512, 16)]
    assert model.classifier[1].weight.std() < 0.02
    assert isinstance(create("squeezenet1_1", num_classes=0).classifier[1], nn.Identity)


def test_what_is_refused() -> None:
    refused: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (convblocks.Fire, (0, 4), {}, "Fire: expected in_channels to be a positive integer, got 0"),
        (convblocks.Fire, (8, 4, 0), {}, "Fire: expected expand1x1 to be a positive integer, got 0"),
        (convblocks.Fire, (8, 4), {"bypass": True}, "Fire: expected in_channels of 32 for a bypass, .*, got 8"),
        (convblocks.Fire, (8, 4), {"drop_path": 0.1}, "Fire: expected drop_path of 0 without a bypass, got 0.1"),
        (convblocks.Fire, (8, 4), {"attention": "no"}, "Fire: expected attention to be one of .*, got no"),
        (create, ("squeezenet1_0",), {"drop_path_rate": 0.1}, "expected drop_path_rate of 0 without bypass, got 0.1"),
    ]
    for make, arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            make(*arguments, **options)
