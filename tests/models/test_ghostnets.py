"""GhostNet and its blocks against timm's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import ghostnet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised, without_rounding


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("ghostnet", 0.5, 2_587_292),
        ("ghostnet", 1.0, 5_182_508),
        ("ghostnet", 1.3, 7_358_820),
        ("ghostnetv2", 1.0, 6_156_908),
        ("ghostnetv2", 1.3, 8_960_404),
        ("ghostnetv2", 1.6, 12_392_698),
    ],
)
def test_parameters(name: str, width: float, count: int) -> None:
    assert parameters(name, width=width) == count


def test_is_timms() -> None:
    theirs = without_rounding(randomised(lambda: timm.create_model("ghostnet_050", drop_rate=0)))
    ours = without_rounding(create("ghostnet", width=0.5, drop_rate=0.0))
    assert_same(ours, theirs, "timm", torch.randn(2, 3, 64, 64))
    sd = theirs.state_dict()  # the authors' keys, too
    assert convblocks.convert_state_dict(sd, "official", ours).keys() == ours.state_dict().keys()


@pytest.mark.parametrize(("name", "theirs"), [("ghostnet", "ghostnet_100"), ("ghostnetv2", "ghostnetv2_100")])
def test_outputs_are_timms(name: str, theirs: str) -> None:
    timms = randomised(lambda: timm.create_model(theirs)).eval()
    ours = create(name).eval()
    ours.load_state_dict(convblocks.convert_state_dict(timms.state_dict(), model=ours), strict=True)
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        expected = timms(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_multiply_accumulates() -> None:
    counts = []
    for make in (lambda: create("ghostnet"), lambda: timm.create_model("ghostnet_100")):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, convblocks.use_backend("reference"):
            make().eval()(torch.empty(1, 3, 224, 224))
        counts.append(counter.get_total_flops() // 2)
    assert counts[0] == counts[1]
    assert f"{counts[0] / 1e9:.3f}" == "0.141"


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("sizes", [(6, 9), (5, 7, 3, 3, 5), (4, 8, 1, 4), (4, 1)])
def test_module_is_timms(sizes: tuple[int, ...], decoupled: bool) -> None:
    """Also with channels to cut off."""
    cls = ghostnet.GhostModuleV2 if decoupled else ghostnet.GhostModule
    theirs = randomised(lambda: cls(*sizes)).double()
    ours = convblocks.GhostModule(*sizes, decoupled=decoupled, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for train in (False, True):
        results = []
        for module in (ours, theirs):
            x = torch.linspace(-1, 1, 2 * sizes[0] * 72, dtype=torch.float64).sin().view(2, -1, 9, 8).requires_grad_()
            y = module.train(train)(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, [p.grad for p in module.parameters()]))
        torch.testing.assert_close(*results)


def test_options() -> None:
    """Attention where the network has squeeze-excite; a sample skips blocks in training."""
    model = create("ghostnet", width=0.5, attention="eca")
    assert len([m for m in model.modules() if isinstance(m, convblocks.ECA)]) == 7
    assert not [m for m in model.modules() if isinstance(m, convblocks.SqueezeExcite)]
    model = create("ghostnet", width=0.5, attention=None, drop_path_rate=0.5, drop_rate=0.0)
    drops = [b.drop_path for b in model.modules() if isinstance(b, convblocks.GhostBottleneck)]
    assert drops == pytest.approx([0.5 * i / 15 for i in range(16)])
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    assert model.feature_info() == [(8, 2), (12, 4), (20, 8), (56, 16), (480, 32)]


def test_what_is_refused() -> None:
    refused: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (convblocks.GhostModule, (0, 8), {}, "GhostModule: expected in_channels to be a positive integer, got 0"),
        (convblocks.GhostModule, (8, 8), {"ratio": 1}, "GhostModule: expected a ratio of at least 2, got 1"),
        (convblocks.GhostModule, (8, 8, 2), {}, "GhostModule: expected an odd kernel_size, got 2"),
        (convblocks.GhostModule, (8, 8), {"dw_size": 4}, "GhostModule: expected an odd dw_size, got 4"),
        (convblocks.GhostModule, (8, 8), {"activation": "no"}, "expected activation to be one of .*, got no"),
        (convblocks.GhostBottleneck, (8, 0, 8), {}, "GhostBottleneck: expected mid_channels to be a positive"),
        (convblocks.GhostBottleneck, (8, 16, 8, 2), {}, "GhostBottleneck: expected an odd kernel_size, got 2"),
        (convblocks.GhostBottleneck, (8, 16, 8), {"stride": 0}, "expected stride to be a positive integer, got 0"),
        (convblocks.GhostBottleneck, (8, 16, 8), {"attention": "no"}, "expected attention to be one of .*, got no"),
        (convblocks.GhostBottleneck, (8, 16, 8), {"drop_path": 1.0}, "expected drop_path from 0 to below 1, got"),
        (create, ("ghostnet",), {"width": 0}, "GhostNet: expected a width above 0, got 0"),
    ]
    for make, arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            make(*arguments, **options)


def test_folds() -> None:
    """All norms go into the convolutions before them."""
    model = randomised(lambda: create("ghostnet", width=0.5)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        report = convblocks.accelerate(model, fold_bn=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in create("ghostnet", width=0.5).modules())
    assert sum(e.reason.endswith(" folded in") for e in report.replaced) == norms
