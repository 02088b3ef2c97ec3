"""Inception v1, v3 and v4 against torchvision's and timm's."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import convblocks
from convblocks.models import create
from tests.models.common import assert_same, macs, parameters, randomised


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("inception_v1", {}, 6_624_904),
        ("inception_v1", {"aux_logits": True}, 13_004_888),
        ("inception_v3", {}, 23_834_568),
        ("inception_v3", {"aux_logits": True}, 27_161_264),
        ("inception_v4", {}, 42_679_816),
    ],
)
def test_parameters(name: str, options: dict[str, Any], count: int) -> None:
    assert parameters(name, **options) == count


def test_parameters_of_5x5_convolutions() -> None:
    """25 weights instead of 9 for each pair of channels of the third branches."""
    pairs = [(16, 32), (32, 96), (16, 48), (24, 64), (24, 64), (32, 64), (32, 128), (32, 128), (48, 128)]
    assert parameters("inception_v1", large_kernel=5) == 6_624_904 + 16 * sum(a * b for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("inception_v1", 224, 1.498), ("inception_v3", 299, 5.713), ("inception_v4", 299, 12.254)],
)
def test_macs(name: str, size: int, count: float) -> None:
    assert macs(name, size) == pytest.approx(count, abs=5e-4)


def _googlenet(**options: Any) -> nn.Module:
    return torchvision.models.googlenet(init_weights=False, dropout=0.0, dropout_aux=0.0, **options)


def _joined(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else torch.cat(outputs, 1)


@pytest.mark.parametrize("aux_logits", [True, False])
def test_v1_is_torchvisions(aux_logits: bool) -> None:
    """In training the classes and those of the auxiliary classifiers, in their order."""
    options = {"num_classes": 7, "aux_logits": aux_logits, "transform_input": True}
    ours = create("inception_v1", drop_rate=0.0, **options)
    if aux_logits:
        ours.aux1.dropout.p = ours.aux2.dropout.p = 0.0
    assert_same(ours, randomised(lambda: _googlenet(**options)), "torchvision", torch.randn(2, 3, 64, 64), _joined)
    if aux_logits:
        assert ours.train()(torch.randn(2, 3, 64, 64))._fields == ("logits", "aux_logits2", "aux_logits1")


def _inception_v3(**options: Any) -> nn.Module:
    return torchvision.models.inception_v3(init_weights=False, dropout=0.0, **options)


def test_v3_is_torchvisions() -> None:
    options = {"num_classes": 7, "aux_logits": False, "transform_input": True}
    theirs = randomised(lambda: _inception_v3(**options))
    assert_same(create("inception_v3", drop_rate=0.0, **options), theirs, "torchvision", torch.randn(2, 3, 75, 75))


def test_v3_is_torchvisions_with_its_auxiliary_classifier() -> None:
    """It needs images of full size, too large for gradients here."""
    options = {"num_classes": 7, "aux_logits": True}
    ours, theirs = create("inception_v3", drop_rate=0.0, **options), randomised(lambda: _inception_v3(**options))
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), "torchvision", ours))
    x = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        got, expected = ours.train()(x), theirs.train()(x)
    assert got._fields == expected._fields == ("logits", "aux_logits")
    for ys in zip(got, expected, strict=True):
        torch.testing.assert_close(*ys, rtol=1e-3, atol=1e-3)


def test_refuses_images_too_small_for_the_auxiliary_classifier() -> None:
    with torch.device("meta"):
        model, x = create("inception_v3", aux_logits=True), torch.empty(2, 3, 298, 298)
    with pytest.raises(ValueError, match=r"InceptionV3: .* an image of 299 x 299, got a map of 16 x 16"):
        model(x)
    assert model.eval()(x).shape == (2, 1000)


def test_v3s_auxiliary_classifier_is_torchvisions() -> None:
    theirs = randomised(lambda: torchvision.models.inception.InceptionAux(768, 7)).double()
    ours = create("inception_v3", num_classes=7, aux_logits=True).AuxLogits.double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 768, 17, 17, dtype=torch.float64)
    for train in (True, False):
        results = []
        for model in (ours, theirs):
            model.zero_grad()
            y = model.train(train)(x)
            (y * torch.arange(7)).sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*results)


def test_v3_is_timms() -> None:
    """Its gradients are compared with torchvision's."""
    ours, theirs = create("inception_v3", num_classes=7), timm.create_model("inception_v3", num_classes=7)
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), "timm", ours))
    x = torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        expected = theirs.eval()(x)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_v4_is_timms() -> None:
    """The whole in float32; gradients without the modules that repeat others."""
    ours, theirs = create("inception_v4", num_classes=7), timm.create_model("inception_v4", num_classes=7)
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), "timm", ours))
    x = torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        expected = theirs.eval()(x)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for model in (ours, theirs):
        model.features = nn.Sequential(*[model.features[i] for i in (0, 1, 2, 3, 4, 5, 6, 10, 11, 18, 19)])
    ours.drop.p = 0.0
    assert_same(ours, randomised(lambda: theirs), "timm", x)


@pytest.mark.parametrize(("name", "count"), [("inception_v1", 9), ("inception_v3", 11), ("inception_v4", 16)])
def test_attention_follows_each_module(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create(name, attention="se")
    attentions = [m for m in model.modules() if isinstance(m, convblocks.SqueezeExcite)]
    modules = [m for m in model.modules() if isinstance(m, convblocks.InceptionBranches) and m.se is not None]
    assert len(attentions) == len(modules) == count
    assert [m.se.fc1.in_channels for m in modules] == [m.out_channels for m in modules]


def test_attention_leaves_the_keys_as_they_are() -> None:
    plain, attended = (create("inception_v1", attention=attention).state_dict().keys() for attention in (None, "eca"))
    assert attended > plain
    assert all(key.split(".")[1] == "se" for key in attended - plain)


def test_a_module_applies_its_attention_to_the_concatenation() -> None:
    module = convblocks.InceptionV1Module(8, 2, 2, 2, 2, 2, 2, attention="simam").eval()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(module(x), convblocks.ops.simam(module.concatenate(x)))


def test_auxiliary_classifiers_go_with_the_classes() -> None:
    assert parameters("inception_v1", aux_logits=True, num_classes=0) == parameters("inception_v1", num_classes=0)
    model = create("inception_v1", aux_logits=True, features_only=True)
    assert [m.shape[1] for m in model(torch.randn(2, 3, 64, 64))] == [64, 192, 480, 832, 1024]


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = create("inception_v3", aux_logits=True, attention="se")
    assert float(model.Mixed_6b.branch7x7_1.conv.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert float(model.AuxLogits.fc.weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    assert float(model.Mixed_7c.se.fc1.weight.detach().std()) < 0.02  # as it comes


@pytest.mark.parametrize("name", ["inception_v1", "inception_v4", "inception_resnet_v1"])
def test_pickles_with_attention_of_ones_own(name: str) -> None:
    """What made it is not kept."""
    with torch.device("meta"):
        model = create(name, attention=lambda channels: convblocks.ECA(channels))
        assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()


def test_norm_eps() -> None:
    for name in ("inception_v1", "inception_v3"):
        with torch.device("meta"):
            model = create(name, aux_logits=True, norm_eps=0.25)
        assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}
    with torch.device("meta"):
        model = create("inception_v4", norm_eps=0.25)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}


def test_refuses_numbers_and_names() -> None:
    with pytest.raises(ValueError, match="InceptionV3A: expected in_channels to be a positive integer, got 0"):
        convblocks.InceptionV3A(0, 32)
    with pytest.raises(ValueError, match="expected out_channels to be a positive integer, got -1"):
        convblocks.InceptionV3A(8, -1)
    with pytest.raises(ValueError, match="InceptionV1Module: expected large_kernel to be 3 or 5, got 4"):
        create("inception_v1", large_kernel=4)
    with pytest.raises(ValueError, match="InceptionV1: expected in_channels to be 3 with transform_input, got 4"):
        create("inception_v1", in_channels=4, transform_input=True)
    with pytest.raises(ValueError, match="InceptionV4A: expected attention to be one of"):
        convblocks.InceptionV4A(8, attention="sea")
