"""FasterNet against timm's, and the authors' keys."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks import BatchNormAct2d, FasterNetBlock
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised

IMAGES = (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "fasternet_t0": 3_905_500,
        "fasternet_t1": 7_595_368,
        "fasternet_t2": 14_982_888,
        "fasternet_s": 31_181_032,
        "fasternet_m": 53_521_464,
        "fasternet_l": 93_465_192,
    }.items(),
)
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("fasternet_t0", {}, {}),
        ("fasternet_t2", {"layers": (1, 1, 2, 1)}, {"depths": (1, 1, 2, 1)}),
        (
            "fasternet_t0",
            {"layer_scale_init_value": 0.5, "mlp_ratio": 3.0, "n_div": 8},
            None,
        ),
    ],
)
def test_is_timms(name: str, options: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    other = options if theirs is None else theirs
    model = randomised(lambda: timm.create_model(name, num_classes=10, drop_path_rate=0.0, **other))
    ours = create(name, num_classes=10, drop_path_rate=0.0, **options)
    assert_same(ours, model, "timm", torch.randn(*IMAGES))


def test_reads_the_authors() -> None:
    """The inverse of the mapping: they number the convolutions between the stages as stages."""
    model = create("fasternet_t0", num_classes=10)
    theirs = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "stages":
            down = parts[2] == "downsample"
            parts[1] = str(2 * int(parts[1]) - down)
            parts = [*parts[:2], *parts[3 if down else 2 :]]
        name = ".".join(parts)
        theirs[name.replace("conv_head", "avgpool_pre_head.1").replace("classifier", "head")] = value
    assert {"stages.5.reduction.weight", "stages.6.blocks.1.mlp.3.weight", "stages.3.norm.bias"} <= theirs.keys()
    assert {"avgpool_pre_head.1.weight", "head.bias", "patch_embed.proj.weight"} <= theirs.keys()
    for source in ("official", None):
        converted = convblocks.convert_state_dict(theirs, source, model)
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())
    own = model.state_dict()
    for source in ("official", "timm", None):
        assert convblocks.convert_state_dict(own, source, model).keys() == own.keys()


@pytest.mark.parametrize(("name", "millions"), [("fasternet_t0", 335), ("fasternet_t1", 851)])
def test_multiply_accumulates(name: str, millions: int) -> None:
    counts = []
    with torch.device("meta"), convblocks.use_backend("reference"):
        for make in (create, timm.create_model):
            with FlopCounterMode(display=False) as counter:
                make(name).eval()(torch.empty(1, 3, 224, 224))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert round(counts[0] / 2e6) == millions


def test_drop_path_is_the_authors() -> None:
    rates = {name: _drop_paths(name)[-1] for name in convblocks.models.names("fasternet_")}
    assert list(rates.values()) == pytest.approx([0, 0.02, 0.05, 0.1, 0.2, 0.3])
    with torch.device("meta"):
        theirs = [
            m.drop_prob for m in timm.create_model("fasternet_s").modules() if isinstance(m, timm.layers.DropPath)
        ]
    assert [rate for rate in _drop_paths("fasternet_s") if rate > 0] == pytest.approx(theirs, abs=1e-6)


def _drop_paths(name: str) -> list[float]:
    with torch.device("meta"):
        return [m.drop_path for m in create(name).modules() if isinstance(m, FasterNetBlock)]


@pytest.mark.parametrize("act", ["gelu", "relu", nn.SiLU, nn.Tanh])
def test_blocks_norm_and_activation(act: Any) -> None:
    """One layer where the activation is known; any other norm or activation in two."""
    own = randomised(lambda: FasterNetBlock(16, act_layer=act)).eval()
    plain = randomised(lambda: FasterNetBlock(16, act_layer=act, norm_layer=nn.BatchNorm2d)).eval()
    assert isinstance(own.mlp[1], BatchNormAct2d) == (act is not nn.Tanh)
    assert type(plain.mlp[1]) is nn.BatchNorm2d
    assert own.state_dict().keys() == plain.state_dict().keys()
    own.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(own(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(own(x), plain(x))
    grouped = FasterNetBlock(16, act_layer=act, norm_layer=lambda c, **k: nn.GroupNorm(4, c, **k))
    assert isinstance(grouped.mlp[1], nn.GroupNorm)
    assert grouped(x).shape == x.shape


def test_blocks_attention() -> None:
    x = torch.randn(2, 16, 6, 5)
    attended = randomised(lambda: FasterNetBlock(16, attention="se")).eval()
    plain = FasterNetBlock(16).eval()
    plain.load_state_dict(attended.state_dict(), strict=False)
    torch.testing.assert_close(attended(x), x + attended.se(plain(x) - x))
    with pytest.raises(ValueError, match=r"FasterNetBlock: expected attention to be one of se, .*, got sea"):
        create("fasternet_t0", attention="sea")
    with pytest.raises(ValueError, match=r"FasterNetBlock: expected act_layer to be one of relu, .*, got no"):
        create("fasternet_t0", activation="no")
