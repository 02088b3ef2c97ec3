"""EfficientNetV2 against torchvision's and timm's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

import convblocks
from convblocks.models.efficientnets import EfficientNetV2
from convblocks.models.summary import macs, meta
from tests.models.common import assert_same, parameters, randomised, without_rounding

IMAGES = (2, 3, 48, 48)
SHORT = (  # two blocks in stages of each kind, and two maps
    (True, 1, 24, 2, 1),
    (True, 4, 48, 2, 2),
    (False, 4, 64, 2, 2),
    (False, 6, 80, 2, 1),
)


@pytest.mark.parametrize(
    ("name", "count"),
    {"efficientnet_v2_s": 21_458_488, "efficientnet_v2_m": 54_139_356, "efficientnet_v2_l": 118_515_272}.items(),
)
def test_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


def test_is_torchvisions() -> None:
    """A short one, in all that a network has."""
    configs = [
        (FusedMBConvConfig if fused else MBConvConfig)(expand, 3, stride, c, out, count)
        for c, (fused, expand, out, count, stride) in zip((24, 24, 48, 64), SHORT, strict=True)
    ]
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    make = torchvision.models.efficientnet.EfficientNet
    theirs = without_rounding(randomised(lambda: make(configs, 0.0, 0.0, norm_layer=norm, last_channel=1280)))
    ours = without_rounding(EfficientNetV2(SHORT, drop_rate=0.0, drop_path_rate=0.0))
    assert_same(ours, theirs, "torchvision", torch.randn(*IMAGES))


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "efficientnet_v2_m"])
def test_keys_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    model = meta(name)
    assert {k: t.shape for k, t in theirs.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}
    probabilities = [m.p for m in theirs.modules() if type(m).__name__ == "StochasticDepth"]
    assert [m.drop_path for m in model.modules() if hasattr(m, "drop_path")] == pytest.approx(probabilities)
    assert model.classifier[0].p == theirs.classifier[0].p
    norms = [{(m.eps, m.momentum) for m in n.modules() if isinstance(m, nn.BatchNorm2d)} for n in (model, theirs)]
    assert norms[0] == norms[1]


def test_is_timms() -> None:
    """A short one, too."""
    stages = ["cn_r2_k3_s1_e1_c24_skip", "er_r2_k3_s2_e4_c48", "ir_r2_k3_s2_e4_c64_se0.25", "ir_r2_k3_s1_e6_c80_se0.25"]
    arguments = decode_arch_def([[stage] for stage in stages])
    make = partial(timm.models.EfficientNet, arguments, num_features=1280, stem_size=24, act_layer=nn.SiLU)
    theirs = without_rounding(randomised(make))
    ours = without_rounding(EfficientNetV2(SHORT, drop_rate=0.0, drop_path_rate=0.0, norm_eps=1e-5))
    assert_same(ours, theirs, "timm", torch.randn(*IMAGES))


def test_keys_of_timm() -> None:
    with torch.device("meta"):
        sd = timm.create_model("efficientnetv2_l").state_dict()
    model = meta("efficientnet_v2_l")
    assert convblocks.convert_state_dict(sd, model=model).keys() == model.state_dict().keys()


@pytest.mark.parametrize(("name", "size", "expected"), [("efficientnet_v2_s", 384, 8.366)])
def test_published_multiply_accumulates(name: str, size: int, expected: float) -> None:
    assert macs(meta(name), size) / 1e9 == pytest.approx(expected, abs=5e-4)


def test_maps() -> None:
    """One at each halving."""
    assert meta("efficientnet_v2_s").feature_info() == [(24, 2), (48, 4), (64, 8), (160, 16), (1280, 32)]


@pytest.mark.parametrize(("attention", "kind"), [("eca", convblocks.ECA), ("cbam", convblocks.CBAM)])
def test_attention_replaces_squeeze_excite(attention: str, kind: type[nn.Module]) -> None:
    model = meta("efficientnet_v2_s", attention=attention)
    assert len([m for m in model.modules() if isinstance(m, kind)]) == 30
    assert not [m for m in model.modules() if isinstance(m, convblocks.SqueezeExcite)]


def test_first_values() -> None:
    """The classifier's are uniform, up to the root of one over the number of classes."""
    layer: Any = EfficientNetV2(SHORT, num_classes=100).classifier[1]
    assert 0.099 < float(layer.weight.detach().abs().max()) <= 0.1
    assert not layer.bias.any()


def test_folds() -> None:
    """Each norm, also those that add a residual."""
    model = EfficientNetV2(SHORT, num_classes=5).eval()
    norms = len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        report = convblocks.accelerate(model, fold_bn=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert len([m for m in model.modules() if type(m).__name__ == "FoldedOwnBatchNormAct2d"]) == norms, str(report)


def test_keys_of_one_row() -> None:
    """As WZMIAOMIAO's network has its blocks: in one row, without stages."""
    model = EfficientNetV2(SHORT, num_classes=3)
    names = ("expand_conv", "dwconv", "se", "project_conv")
    layers = {"stem": model.features[0], "head.project_conv": model.features[-1]}
    for i, block in enumerate(block for stage in list(model.features)[1:-1] for block in stage):
        parts = list(block.block)  # one, two, or four
        own = names[-1:] if len(parts) == 1 else names[:: 5 - len(parts)]
        layers |= {f"blocks.{i}.{name}": part for name, part in zip(own, parts, strict=True)}
    theirs = {f"head.classifier.{key}": t for key, t in model.classifier[1].state_dict().items()}
    for name, layer in layers.items():
        pair = ("conv_reduce", "conv_expand") if name.endswith("se") else ("conv", "bn")
        for inner, module in zip(pair, layer.children(), strict=True):
            theirs |= {f"{name}.{inner}.{key}": t for key, t in module.state_dict().items()}
    converted = convblocks.convert_state_dict(theirs, model=model)
    for key, t in model.state_dict().items():
        assert torch.equal(converted[key], t), key
