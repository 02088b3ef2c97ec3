"""fold_bn: a norm that no convolution takes in, and what must not be folded."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convblocks
from tests.accelerate.sources import timm, torchvision
from tests.accelerate.test_fold import X, assert_same, counted, folded, random_norms, trio


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("act", [None, nn.ReLU(inplace=True), nn.Hardswish(), nn.GELU("tanh"), nn.Tanh()])
def test_a_norm_alone(act: nn.Module | None, affine: bool, half: bool, backend: str, device: str) -> None:
    model = random_norms(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=True), *([act] if act else []))).eval()
    if not affine:
        model[1] = nn.BatchNorm2d(3, affine=False).eval()
    model = model.to(device)
    fast = copy.deepcopy(model)
    assert counted(convblocks.accelerate(fast, fold_bn=True, strict=True)) == (0, 0, 1)
    x = X.to(device, torch.bfloat16 if half else torch.float32)
    with torch.no_grad():
        y = fast(x)
        assert y.dtype == x.dtype
        torch.testing.assert_close(y, model(x))
        for m in (model, fast):
            m[1].running_var.mul_(2)
            m[1].eps = 0.1
        torch.testing.assert_close(fast(x), model(x))
        for wrong in (x[0], x[:, :2]):
            with pytest.raises((ValueError, RuntimeError)) as expected:
                model(wrong)
            with pytest.raises(expected.type, match=re.escape(str(expected.value))):
                fast(wrong)
    for m in (model, fast):
        m.train()
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast[1].running_mean, model[1].running_mean)


def test_a_norm_is_its_own_where_what_follows_is_not_known() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(self.bn(y)) + self.bn(y) + y

    model = random_norms(Model()).eval()
    fast = copy.deepcopy(model)
    (entry,) = convblocks.accelerate(fast, fold_bn=True).entries
    assert (entry.name, entry.operation, entry.reason) == ("bn", "scale_shift_act", "for inference")
    assert_same(fast, model, X)


# --- what must not be folded ------------------------------------------------------------------------------------------


def test_a_convolution_that_is_used_twice() -> None:
    """As in heads that share their convolutions and not their norms."""
    shared = nn.Conv2d(3, 3, 1)
    model = random_norms(nn.Sequential(shared, nn.BatchNorm2d(3), nn.Sequential(shared, nn.BatchNorm2d(3)))).eval()
    fast = copy.deepcopy(model)
    assert counted(convblocks.accelerate(fast, fold_bn=True)) == (0, 0, 2)
    assert_same(fast, model, X)


def test_an_activation_that_is_used_twice() -> None:
    act = nn.ReLU()
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act, nn.BatchNorm2d(3), act]
    model = random_norms(nn.Sequential(*layers)).eval()
    fast = copy.deepcopy(model)
    assert counted(convblocks.accelerate(fast, fold_bn=True)) == (0, 1, 1)
    assert type(fast[2]) is nn.ReLU
    assert_same(fast, model, X)


def test_a_block_with_a_forward_of_its_own() -> None:
    model = random_norms(torchvision.models.resnet18()).eval()
    block = model.layer1[0]
    block.forward = lambda x: block.bn1(block.conv1(x) + 1)
    report = convblocks.accelerate(model, fold_bn=True, include="layer1.0.*")
    assert {e.name: e.operation for e in report.replaced} == {
        "layer1.0.bn1": "scale_shift_act",
        "layer1.0.bn2": "scale_shift_act",
    }


def test_an_activation_in_a_norm_that_is_exchanged() -> None:
    model = random_norms(timm.layers.ConvNormAct(3, 4, 3)).eval()
    fast = copy.deepcopy(model)
    assert counted(convblocks.accelerate(fast, fold_bn=True)) == (0, 1, 0)
    assert_same(fast, model, X)
    for m in (model, fast):
        m.bn.act = nn.Tanh()
    assert_same(fast, model, X)


def test_modes_of_inference_and_transforms_share_nothing() -> None:
    model = trio(groups=1)
    fast = folded(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X))
    assert_same(fast, model, X)
    stacked = {k: torch.stack((v, v * 2)) for k, v in model.named_parameters()}
    with torch.no_grad():
        got, expected = (
            torch.func.vmap(lambda p, m=m: torch.func.functional_call(m, p, (X,)))(stacked) for m in (fast, model)
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert_same(fast, model, X)


def test_a_residual_in_a_sequential() -> None:
    """What a Sequential calls has none; whoever gives it one nevertheless is told."""
    model = convblocks.ConvNormAct(3, 3).eval()
    fast = folded(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))
        with pytest.raises(RuntimeError, match="BatchNormAct2d: expected no residual in a Sequential that is folded"):
            fast.bn(fast.conv(X), X)
    torch.testing.assert_close(fast.bn(fast.conv(X), X), model.bn(model.conv(X), X))


def test_exclude_and_filter_hold_for_what_is_folded_in() -> None:
    options: list[dict[str, Any]] = [{"exclude": "1"}, {"filter_fn": lambda module, name: name != "1"}]
    for option in options:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        report = convblocks.accelerate(model, fold_bn=True, **option)
        assert not report.replaced
        assert "1, which would be folded in" in report.skipped[0].reason
        assert type(model[1]) is nn.BatchNorm2d
