"""Darknet-53 against timm's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks import DarknetResidual
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised

SMALL = (1, 1, 2, 1, 1)


def test_parameters() -> None:
    assert parameters("darknet53") == 41_609_928


def _timms(name: str, slope: float = 0.01) -> nn.Module:
    """Theirs with an eighth of the channels."""
    cfg = timm.models.cspnet.model_cfgs[name]
    narrow = replace(cfg, stem=replace(cfg.stem, out_chs=4), stages=replace(cfg.stages, out_chs=(8, 16, 32, 64, 128)))
    model = timm.models.cspnet.CspNet(narrow, num_classes=10)
    for m in model.modules():
        if isinstance(m, nn.LeakyReLU):
            m.negative_slope = slope
    return model


@pytest.mark.parametrize("slope", [0.01, 0.1])
def test_is_timms(slope: float) -> None:
    """But for the slope, which theirs has smaller."""
    theirs = randomised(lambda: _timms("darknet53", slope))
    ours = create("darknet53", width=4, negative_slope=slope, num_classes=10)
    assert_same(ours, theirs, "timm", torch.randn(2, 3, 64, 64))


def test_of_full_width_is_timms() -> None:
    with torch.device("meta"):
        ours, theirs = create("darknet53", negative_slope=0.01), timm.create_model("darknet53")
    ours, theirs = ours.to_empty(device="cpu").eval(), theirs.to_empty(device="cpu").eval()
    for name, t in theirs.state_dict().items():
        if t.dim() > 1:
            t.normal_(0.0, t[0].numel() ** -0.5)
        elif t.is_floating_point():
            t.uniform_(0.5 if "weight" in name or "var" in name else -0.5, 1.5)
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), "timm", ours), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_attention_is_timms() -> None:
    """Squeeze-excite between the convolutions, with their activation."""

    def attention(channels: int) -> nn.Module:
        return convblocks.SqueezeExcite(channels, act_layer="leaky_relu")

    theirs = randomised(lambda: _timms("sedarknet21"))
    ours = create(
        "darknet53", width=4, layers=(1, 1, 1, 2, 2), attention=attention, negative_slope=0.01, num_classes=10
    )
    assert_same(ours, theirs, "timm", torch.randn(2, 3, 64, 64))


def test_maps() -> None:
    """YOLOv3's image."""
    with torch.device("meta"):
        maps = create("darknet53", features_only=True)(torch.empty(2, 3, 416, 416))
    assert [list(m.shape[1:]) for m in maps] == [
        [64, 208, 208],
        [128, 104, 104],
        [256, 52, 52],
        [512, 26, 26],
        [1024, 13, 13],
    ]


def test_multiply_accumulates() -> None:
    counts = []
    with torch.device("meta"), convblocks.use_backend("reference"):
        for make in (create, timm.create_model):
            with FlopCounterMode(display=False) as counter:
                make("darknet53").eval()(torch.empty(1, 3, 256, 256))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert round(counts[0] / 2e9, 3) == 9.285


def test_reads_pytorchcv() -> None:
    model = create("darknet53", layers=SMALL, num_classes=10)
    theirs = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "stem":
            parts[:2] = ["features", "init_block"]
        elif parts[0] == "head":
            parts[:2] = ["output"]
        elif parts[2] == "conv_down":
            parts[:3] = ["features", f"stage{int(parts[1]) + 1}", "unit1"]
        else:
            parts[:4] = ["features", f"stage{int(parts[1]) + 1}", f"unit{int(parts[3]) + 2}"]
        theirs[".".join(parts)] = value
    assert {"features.init_block.conv.weight", "features.stage1.unit1.bn.bias", "output.bias"} <= theirs.keys()
    assert {"features.stage3.unit2.conv1.conv.weight", "features.stage3.unit3.conv2.bn.weight"} <= theirs.keys()
    for source in ("pytorchcv", None):
        converted = convblocks.convert_state_dict(theirs, source, model)
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("stage", ["conv_res_block", "cr_block"])
def test_reads_mmdet(prefix: str, stage: str) -> None:
    """A detector's trunk, without classes."""
    model = create("darknet53", layers=SMALL, features_only=True)
    theirs = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "stem":
            parts[:2] = ["conv1"]
        elif parts[2] == "conv_down":
            parts[:3] = [f"{stage}{int(parts[1]) + 1}", "conv"]
        else:
            parts[:4] = [f"{stage}{int(parts[1]) + 1}", f"res{parts[3]}"]
        theirs[prefix + ".".join(parts)] = value
    assert {f"{prefix}conv1.conv.weight", f"{prefix}{stage}3.res1.conv2.bn.weight"} <= theirs.keys()
    for source in ("mmdet", None):
        converted = convblocks.convert_state_dict(theirs, source, model)
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


def test_its_stages_and_head_are_layers() -> None:
    model = create("darknet53", layers=SMALL, num_classes=10).eval()
    assert model.get_submodule("stages.2.blocks.1").conv1.conv.in_channels == 256
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.stages(model.stem(x)), model.forward_features(x))
    doubled = {key: value * 2 if key == "head.fc.bias" else value for key, value in model.state_dict().items()}
    y = torch.func.functional_call(model, doubled, (x,))
    torch.testing.assert_close(y, model(x) + model.head.fc.bias)
    assert not hasattr(model.without_head(), "head")
    assert not [key for key in model.state_dict() if key.startswith("head")]


def test_a_network_needs_no_head() -> None:
    class Bare(convblocks.models.Network):
        def trunk(self) -> list[list[nn.Module]]:
            return [[nn.Identity()]]

    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(Bare(2, 3).without_head()(x)[0], x)


def test_block_is_its_formula() -> None:
    x = torch.randn(2, 32, 6, 5)
    for slope in (0.1, 0.01):
        block = randomised(lambda s=slope: DarknetResidual(32, s, attention="eca")).eval()
        y = x
        for layer in (block.conv1, block.attn, block.conv2):
            y = nn.functional.leaky_relu(_norm(layer.bn, layer.conv(y)), slope) if layer is not block.attn else layer(y)
        torch.testing.assert_close(block(x), x + y)
        with torch.no_grad():
            torch.testing.assert_close(block(x), x + y)


def _norm(bn: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


def test_options() -> None:
    model = create("darknet53", layers=SMALL, drop_path_rate=0.5, norm_eps=1e-3, drop_rate=0.1)
    blocks = [m for m in model.modules() if isinstance(m, DarknetResidual)]
    assert [b.drop_path for b in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert model.drop.p == 0.1


def test_refuses() -> None:
    with pytest.raises(ValueError, match="DarknetResidual: expected an even number of channels, got 7"):
        DarknetResidual(7)
    with pytest.raises(ValueError, match="DarknetResidual: expected drop_path from 0 to below 1, got 1"):
        DarknetResidual(8, drop_path=1.0)
