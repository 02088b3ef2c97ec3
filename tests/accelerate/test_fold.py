"""fold_bn: a norm in the convolution before it, or with the activation after it in one pass."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convblocks
from convblocks.opinfo import LAYOUTS
from tests.accelerate.sources import timm, torchvision


def random_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


each_groups = pytest.mark.parametrize("groups", [6, 2, 1])  # depthwise, and dense


def trio(act: nn.Module | None = None, bias: bool = False, groups: int = 6) -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(6)]
    model = nn.Sequential(*layers, act or nn.ReLU6(inplace=True), nn.Conv2d(6, 2, 1))
    return random_norms(model).eval()  # type: ignore[return-value]


def folded(model: nn.Module) -> nn.Module:
    fast = copy.deepcopy(model)
    report = convblocks.accelerate(fast, fold_bn=True, strict=True)
    assert all(" folded in" in e.reason for e in report.replaced if e.operation in ("depthwise_conv2d", "conv2d"))
    return fast


@torch.no_grad()
def assert_same(fast: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    exact = copy.deepcopy(model).double()(x.double())
    assert (fast(x) - exact).norm() <= tolerance * exact.norm()


X = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.Tanh()]
)
def test_activations(act: nn.Module, bias: bool, backend: str, device: str) -> None:
    model = trio(act, bias).to(device)
    fast = folded(model)
    assert_same(fast, model, X.to(device))
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


@pytest.mark.parametrize("layout", ["channels_last", "channels_last_slice", "crop", "contiguous"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
        {"kernel_size": (1, 5), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": 4, "padding": "same", "bias": False},
    ],
)
def test_dense_convolutions(options: dict[str, Any], layout: str) -> None:
    """The result is laid out as before, at any image size; a wrong input is refused with torch's words."""
    model = random_norms(nn.Sequential(nn.Conv2d(6, 10, **options), nn.BatchNorm2d(10))).eval()
    fast = folded(model)
    for n, h, w in ((2, 9, 11), (1, 17, 5), (3, 9, 11)):
        x = LAYOUTS[layout](torch.randn(n, 6, h, w))
        with torch.no_grad():
            got, expected = fast(x), model(x)
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()
    for size in ((2, 5, 9, 9), (0, 6, 9, 9), (2, 6, 9, 1), (6, 9, 9)):
        x = torch.randn(size)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        with torch.no_grad():
            try:
                expected = model(x)
            except (RuntimeError, ValueError) as e:
                with pytest.raises(type(e), match=re.escape(str(e))):
                    fast(x)
            else:
                torch.testing.assert_close(fast(x), expected)


@each_groups
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, groups: int, backend: str, device: str) -> None:
    model = trio(groups=groups).to(device, dtype)
    fast = folded(model)
    with torch.no_grad():
        y = fast(X.to(device, dtype))
    assert y.dtype == dtype
    assert_same(fast, model, X.to(device, dtype), 1e-12 if dtype == torch.float64 else 2e-2)


@each_groups
def test_training_and_gradients_are_untouched(groups: int, backend: str, device: str) -> None:
    model = trio(groups=groups).to(device)
    fast = folded(model)
    for train in (True, False):
        results = []
        for m in (model, fast):
            m.train(train)
            y = m(X.to(device))
            results.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast[2].running_mean, model[2].running_mean)
    assert_same(fast.eval(), model.eval(), X.to(device))  # with the statistics that training left


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load": lambda m: m.load_state_dict(
        {k: v * 0.7 + 0.1 for k, v in m.state_dict().items() if v.dtype.is_floating_point}, strict=False
    ),
    "mean": lambda m: m[2].running_mean.add_(1),
    "weight": lambda m: m[1].weight.mul_(2),
    "new data": lambda m: setattr(m[1].weight, "data", m[1].weight * 3),
    "new parameter": lambda m: setattr(m[2], "weight", nn.Parameter(torch.full((6,), 3.0, device=m[2].weight.device))),
    "new norm": lambda m: setattr(m, "2", random_norms(nn.BatchNorm2d(6, device=m[2].weight.device)).eval()),
    "no norm": lambda m: setattr(m, "2", nn.Identity()),
    "new activation": lambda m: setattr(m, "3", nn.Tanh()),
    "dilation": lambda m: (setattr(m[1], "dilation", (2, 2)), setattr(m[1], "padding", (2, 2))),
    "eps": lambda m: setattr(m[2], "eps", 0.5),
}


@each_groups
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_it(change: str, groups: int, backend: str, device: str) -> None:
    model = trio(groups=groups).to(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, fast = copy.deepcopy(model), folded(model)
        x = X.to(device, memory_format=layout)
        assert_same(fast, ours, x)
        with torch.no_grad():
            for m in (ours, fast):
                torch.manual_seed(0)
                CHANGES[change](m)
        assert_same(fast, ours, x)


def test_changes_of_data() -> None:
    """Those through ``.data`` are not counted by torch: where weights are kept, they are noticed with the next mode."""
    for groups in (6, 1):
        model = trio(groups=groups)
        fast = folded(model)
        assert_same(fast, model, X)
        for m in (model, fast):
            m[1].weight.data.mul_(2)
        assert_same(fast if groups == 6 else fast.eval(), model, X)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_hooks(layer: int) -> None:
    """One that is there keeps the norm apart; one that comes later does so again, and sees what it did before."""
    model = trio()
    hooked = copy.deepcopy(model)
    hooked[layer].register_forward_hook(lambda *args: None)
    (entry,) = convblocks.accelerate(hooked, fold_bn=True).entries
    assert entry.reason == ("it has hooks" if layer == 1 else f"no norm is folded in: {layer} has hooks") or entry.error
    seen: list[Tensor] = []
    fast = folded(model)
    for m in (model, fast):
        m[layer].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        with torch.no_grad():
            m(X)
    torch.testing.assert_close(*seen)


@each_groups
def test_copies_pickles_and_reverts(groups: int) -> None:
    model = trio(groups=groups)
    fast = folded(model)
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


@each_groups
def test_a_replica_does_its_own(groups: int) -> None:
    """DataParallel's: the same dictionaries, other tensors."""
    model = trio(groups=groups)
    fast = folded(model)
    conv = fast[1]
    replica = conv._replicate_for_data_parallel()
    replica._parameters = {"weight": conv.weight * 2, "bias": None}
    with torch.no_grad():
        torch.testing.assert_close(replica(fast[0](X)), model[1](model[0](X)) * 2)


@each_groups
def test_functional_call(groups: int) -> None:
    model = trio(groups=groups)
    fast = folded(model)
    other = {k: v * 1.5 for k, v in model.named_parameters()}
    with torch.no_grad():
        fast(X)
        got, expected = (torch.func.functional_call(m, other, (X,)) for m in (fast, model))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(fast(X), model(X))


@each_groups
def test_compile(groups: int) -> None:
    model = trio(groups=groups)
    fast = folded(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(compiled(X), model(X))
    torch._dynamo.reset()


def _own(activation: str, groups: int) -> nn.Module:
    return convblocks.ConvNormAct(3, 3, groups=groups, activation=activation, negative_slope=0.1)


def counted(report: Any) -> tuple[int, ...]:
    folded = [e.operation for e in report.replaced if e.reason.endswith(" folded in") or e.reason == "for inference"]
    return tuple(folded.count(name) for name in ("depthwise_conv2d", "conv2d", "scale_shift_act"))


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (lambda: torchvision.models.mobilenet_v2(), (17, 35, 0)),
        (lambda: torchvision.models.mobilenet_v3_small(), (11, 23, 0)),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), (19, 37, 0)),
        (lambda: timm.create_model("efficientnet_b0"), (16, 33, 0)),
        (lambda: timm.create_model("tf_efficientnet_lite0"), (16, 32, 1)),
        (lambda: timm.create_model("mobilenetv3_small_050"), (11, 23, 0)),
        (lambda: torchvision.models.resnet18(), (0, 20, 0)),
        (lambda: torchvision.models.resnext50_32x4d(), (0, 53, 0)),
        (lambda: timm.create_model("resnet26d"), (0, 30, 1)),
        (lambda: torchvision.models.densenet121(), (0, 59, 62)),
        (lambda: timm.create_model("densenet121"), (0, 59, 62)),
        (lambda: timm.create_model("resnetv2_50"), (0, 0, 49)),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), convblocks.DepthwiseSeparableConv(8, 4)), (1, 1, 0)),
        (lambda: convblocks.models.resnet18(), (0, 20, 0)),
        (lambda: convblocks.models.resnet18(attention="eca"), (0, 20, 0)),
        (lambda: convblocks.models.simam_resnet18(), (0, 12, 0)),
        (lambda: convblocks.models.resnet18(deep_stem=(32, 32), avg_down=True), (0, 21, 0)),
        (
            lambda: nn.Sequential(*(_own(act, groups) for act in ("silu", "leaky_relu", "gelu") for groups in (1, 3))),
            (3, 3, 0),
        ),
    ],
)
def test_networks(make: Callable[[], nn.Module], counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = random_norms(make()).eval()
    fast = copy.deepcopy(model)
    assert counted(convblocks.accelerate(fast, fold_bn=True)) == counts
    x = torch.randn(2, 3, 64, 64)
    assert_same(fast, model, x, 1e-4)
    assert_same(fast, model, x.to(memory_format=torch.channels_last), 1e-4)
    convblocks.revert(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
