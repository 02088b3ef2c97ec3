"""fold_bn: a norm and an activation in the depthwise convolution before them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convblocks
from tests.accelerate.sources import timm, torchvision


def _random_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def _trio(act: nn.Module | None = None, bias: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), nn.BatchNorm2d(6)]
    model = nn.Sequential(*layers, act or nn.ReLU6(inplace=True), nn.Conv2d(6, 2, 1))
    return _random_norms(model).eval()  # type: ignore[return-value]


def _folded(model: nn.Module) -> nn.Module:
    fast = copy.deepcopy(model)
    report = convblocks.accelerate(fast, fold_bn=True, strict=True)
    assert all(" folded in" in e.reason for e in report.replaced if e.operation == "depthwise_conv2d")
    return fast


@torch.no_grad()
def _assert_same(fast: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    exact = copy.deepcopy(model).double()(x.double())
    assert (fast(x) - exact).norm() <= tolerance * exact.norm()


X = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.Tanh()]
)
def test_activations(act: nn.Module, bias: bool, backend: str, device: str) -> None:
    model = _trio(act, bias).to(device)
    fast = _folded(model)
    _assert_same(fast, model, X.to(device))
    calls: list[str] = []
    operator = convblocks.backends.operators["depthwise_conv2d"]
    original = operator.reference
    operator.reference = lambda *args: (calls.append(args[-1]), original(*args))[1]  # type: ignore[func-returns-value]
    try:
        with torch.no_grad(), convblocks.use_backend("reference"):
            fast(X.to(device))
    finally:
        operator.reference = original
    known = not isinstance(act, nn.Tanh) and getattr(act, "negative_slope", 0.01) == 0.01
    assert len(calls) == 1
    assert (calls[0] != "none") == known


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    model = _trio().to(device, dtype)
    fast = _folded(model)
    with torch.no_grad():
        y = fast(X.to(device, dtype))
    assert y.dtype == dtype
    _assert_same(fast, model, X.to(device, dtype), 1e-12 if dtype == torch.float64 else 2e-2)


def test_training_and_gradients_are_untouched(backend: str, device: str) -> None:
    model = _trio().to(device)
    fast = _folded(model)
    for train in (True, False):
        results = []
        for m in (model, fast):
            m.train(train)
            y = m(X.to(device))
            results.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast[2].running_mean, model[2].running_mean)
    _assert_same(fast.eval(), model.eval(), X.to(device))  # with the statistics that training left


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load": lambda m: m.load_state_dict(
        {k: v * 0.7 + 0.1 for k, v in m.state_dict().items() if v.dtype.is_floating_point}, strict=False
    ),
    "mean": lambda m: m[2].running_mean.add_(1),
    "weight": lambda m: m[1].weight.data.mul_(2),
    "new parameter": lambda m: setattr(m[2], "weight", nn.Parameter(torch.full((6,), 3.0, device=m[2].weight.device))),
    "new norm": lambda m: setattr(m, "2", _random_norms(nn.BatchNorm2d(6, device=m[2].weight.device)).eval()),
    "no norm": lambda m: setattr(m, "2", nn.Identity()),
    "new activation": lambda m: setattr(m, "3", nn.Tanh()),
    "dilation": lambda m: (setattr(m[1], "dilation", (2, 2)), setattr(m[1], "padding", (2, 2))),
    "eps": lambda m: setattr(m[2], "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_it(change: str, backend: str, device: str) -> None:
    model = _trio().to(device)
    fast = _folded(model)
    _assert_same(fast, model, X.to(device))
    with torch.no_grad():
        for m in (model, fast):
            torch.manual_seed(0)
            CHANGES[change](m)
    _assert_same(fast, model, X.to(device))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_hooks(layer: int) -> None:
    """One that is there keeps the norm apart; one that comes later does so again, and sees what it did before."""
    model = _trio()
    hooked = copy.deepcopy(model)
    hooked[layer].register_forward_hook(lambda *args: None)
    (entry,) = convblocks.accelerate(hooked, fold_bn=True).entries
    assert entry.reason == ("it has hooks" if layer == 1 else f"no norm is folded in: {layer} has hooks") or entry.error
    seen: list[Tensor] = []
    fast = _folded(model)
    for m in (model, fast):
        m[layer].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        with torch.no_grad():
            m(X)
    torch.testing.assert_close(*seen)


def test_copies_pickles_and_reverts() -> None:
    model = _trio()
    fast = _folded(model)
    with torch.no_grad():
        y = fast(X)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(twin(X), y)
            twin[2].running_mean.add_(1)  # its own
            assert not torch.equal(twin(X), y)
        assert torch.equal(fast(X), y)
        assert fast.state_dict().keys() == model.state_dict().keys()
        convblocks.revert(fast)
        assert [type(m) for m in fast] == [type(m) for m in model]
        assert torch.equal(fast(X), model(X))
        assert all("fold" not in m.__dict__ for m in fast)


def test_a_replica_does_its_own() -> None:
    """DataParallel's: the same dictionaries, other tensors."""
    model = _trio()
    fast = _folded(model)
    conv = fast[1]
    replica = conv._replicate_for_data_parallel()
    replica._parameters = {"weight": conv.weight * 2, "bias": None}
    with torch.no_grad():
        torch.testing.assert_close(replica(fast[0](X)), model[1](model[0](X)) * 2)


def test_functional_call() -> None:
    model = _trio()
    fast = _folded(model)
    other = {k: v * 1.5 for k, v in model.named_parameters()}
    with torch.no_grad():
        fast(X)
        got, expected = (torch.func.functional_call(m, other, (X,)) for m in (fast, model))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(fast(X), model(X))


def test_compile() -> None:
    model = _trio()
    fast = _folded(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(compiled(X), model(X))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "folds"),
    [
        (lambda: torchvision.models.mobilenet_v2(), 17),
        (lambda: torchvision.models.mobilenet_v3_small(), 11),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), 19),
        (lambda: timm.create_model("efficientnet_b0"), 16),
        (lambda: timm.create_model("tf_efficientnet_lite0"), 16),
        (lambda: timm.create_model("mobilenetv3_small_050"), 11),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), convblocks.DepthwiseSeparableConv(8, 4)), 0),
    ],
)
def test_networks(make: Callable[[], nn.Module], folds: int) -> None:
    torch.manual_seed(0)
    model = _random_norms(make()).eval()
    fast = copy.deepcopy(model)
    report = convblocks.accelerate(fast, fold_bn=True)
    assert sum(e.reason.endswith(" folded in") for e in report.replaced) == folds
    _assert_same(fast, model, torch.randn(2, 3, 64, 64), 1e-4)
