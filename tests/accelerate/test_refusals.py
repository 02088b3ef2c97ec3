"""What must stay as it is, and the reason the report gives."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import convblocks
from tests.accelerate.sources import (
    CHANNELS,
    CbamModule,
    EcaModule,
    InvertedResidual,
    SEModule,
    SmpSCSEModule,
    SqueezeExcitation,
    network,
    timm,
    torchvision,
)

se = partial(SEModule, CHANNELS)
unit = partial(InvertedResidual, CHANNELS, CHANNELS, 1)


def _with(make: Callable[[], nn.Module], change: Callable[[Any], object]) -> nn.Module:
    module = make()
    change(module)
    return module


class _Subclass(SEModule):
    pass


def _quantizable() -> nn.Module:
    model = torchvision.models.quantization.mobilenet_v3_large(quantize=False)
    return next(m for m in model.modules() if isinstance(m, SqueezeExcitation))


class _Branch(nn.Sequential):
    pass


def _quantizable_unit() -> nn.Module:
    model = torchvision.models.quantization.shufflenet_v2_x0_5(quantize=False)
    return next(m for m in model.modules() if isinstance(m, InvertedResidual))


def _double_weight(module: Any) -> None:
    parametrize.register_parametrization(module.fc1, "weight", nn.Tanh())


def _override_forward(module: Any) -> None:
    module.forward = lambda x: x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward hook": (lambda: _with(se, lambda m: m.register_forward_hook(print)), "it has hooks"),
    "forward pre-hook": (lambda: _with(se, lambda m: m.register_forward_pre_hook(print)), "it has hooks"),
    "inner hook": (lambda: _with(se, lambda m: m.act.register_forward_hook(print)), "act has hooks"),
    "inner backward hook": (lambda: _with(se, lambda m: m.fc2.register_full_backward_hook(print)), "fc2 has hooks"),
    "inner backward pre-hook": (
        lambda: _with(se, lambda m: m.fc2.register_full_backward_pre_hook(print)),
        "fc2 has hooks",
    ),
    "parametrized": (lambda: _with(se, _double_weight), "fc1 is parametrized"),
    "weight norm": (lambda: _with(se, lambda m: parametrizations.weight_norm(m.fc2)), "fc2 is parametrized"),
    "pruned": (lambda: _with(se, lambda m: prune.l1_unstructured(m.fc1, "weight", 0.5)), "fc1 computes its weight"),
    "old spectral norm": (lambda: _with(se, lambda m: nn.utils.spectral_norm(m.fc2)), "fc2 computes its weight"),
    "forward on the instance": (lambda: _with(se, _override_forward), "the forward of the module is overridden"),
    "inner forward on the instance": (lambda: _with(se, lambda m: _override_forward(m.fc1)), "the forward of fc1"),
    "compiled in place": (lambda: _with(se, lambda m: m.compile()), "compiled"),
    "compiled child of a compiled model": (lambda: torch.compile(nn.Sequential(se())), "inside a compiled module"),
    "subclass": (lambda: _Subclass(CHANNELS), "a subclass of timm"),
    "quantizable": (_quantizable, "quantization.*a subclass of torchvision"),
    "norm": (lambda: se(norm_layer=nn.BatchNorm2d), "a norm between its layers"),
    "another slope": (lambda: _with(se, lambda m: setattr(m, "act", nn.LeakyReLU(0.2))), "act is LeakyReLU.*0.2"),
    "unknown activation": (lambda: se(act_layer=nn.Mish), "act is Mish"),
    "unknown gate": (lambda: se(gate_layer="tanh"), "gate is Tanh"),
    "gate as activation": (lambda: se(act_layer=nn.Sigmoid), "act is Sigmoid"),
    "activation as gate": (lambda: se(gate_layer=nn.ReLU), "gate is ReLU"),
    "learned activation": (lambda: se(act_layer="prelu"), "act is PReLU"),
    "eca with a hidden layer": (lambda: EcaModule(CHANNELS, use_mlp=True), "use_mlp"),
    "another kind of layer": (lambda: _with(se, lambda m: setattr(m, "fc1", nn.Sequential(m.fc1))), "fc1 is a torch"),
    "quantised": (
        lambda: _with(se, lambda m: setattr(m, "fc1", torch.ao.nn.quantized.Conv2d(CHANNELS, 8, 1))),
        "fc1 is a torch.ao.nn.quantized",
    ),
    "missing layer": (lambda: _with(se, lambda m: delattr(m, "fc2")), "fc2 is missing"),
    "larger kernel": (
        lambda: _with(se, lambda m: setattr(m, "fc1", nn.Conv2d(CHANNELS, 8, 3, padding=1))),
        "not a 1x1",
    ),
    "grouped": (lambda: _with(se, lambda m: setattr(m, "fc1", nn.Conv2d(CHANNELS, 8, 1, groups=8))), "groups"),
    "eca with two filters": (lambda: _with(EcaModule, lambda m: setattr(m, "conv", nn.Conv1d(1, 2, 3))), "one filter"),
    "eca without padding": (lambda: _with(EcaModule, lambda m: setattr(m, "conv", nn.Conv1d(1, 1, 3))), "does not pad"),
    "pools to more than a pixel": (
        lambda: _with(partial(SqueezeExcitation, 8, 2), lambda m: setattr(m, "avgpool", nn.AdaptiveAvgPool2d(2))),
        "does not pool to one pixel",
    ),
    "scripted": (lambda: torch.jit.script(se()), "scripted or traced"),
    "traced": (lambda: torch.jit.trace(se(), torch.randn(1, CHANNELS, 4, 4)), "scripted or traced"),
    "quantizable unit": (_quantizable_unit, "quantization.*a subclass of torchvision"),
    "unit with a hook": (lambda: _with(unit, lambda m: m.register_forward_hook(print)), "it has hooks"),
    "unit with another layer": (
        lambda: _with(unit, lambda m: m.branch2.__setitem__(7, nn.SiLU())),
        "branch2 is not as its class makes it",
    ),
    "unit of stride 1 with a branch": (
        lambda: _with(unit, lambda m: m.branch1.append(nn.ReLU())),
        "branch1 is not as its class makes it",
    ),
    "unit with a branch of its own kind": (
        lambda: _with(unit, lambda m: setattr(m, "branch2", _Branch(*m.branch2))),
        "branch2 is a tests.accelerate.test_refusals._Branch",
    ),
    "scse without hidden units": (lambda: SmpSCSEModule(8), "cSE.1 has no outputs"),
    "scse with another layer": (
        lambda: _with(partial(SmpSCSEModule, 32), lambda m: m.cSE.__setitem__(2, nn.SiLU())),
        "cSE.2 is a torch.nn.modules.activation.SiLU",
    ),
    "scse with a larger kernel": (
        lambda: _with(partial(SmpSCSEModule, 32), lambda m: m.sSE.__setitem__(0, nn.Conv2d(32, 1, 3, padding=1))),
        "sSE.0 is not a 1x1",
    ),
    "scse with one layer more": (
        lambda: _with(partial(SmpSCSEModule, 32), lambda m: m.sSE.append(nn.ReLU())),
        "sSE has 3 layers, not 2",
    ),
    "cbam with two gates": (
        lambda: _with(partial(CbamModule, 32), lambda m: setattr(m.spatial, "gate", nn.Hardsigmoid())),
        "channel and spatial have different gates: hardsigmoid, sigmoid",
    ),
    "cbam with a dilated convolution": (
        lambda: _with(
            partial(CbamModule, 32),
            lambda m: setattr(m.spatial.conv, "conv", nn.Conv2d(2, 1, 3, padding=2, dilation=2)),
        ),
        "does not convolve planes to one of the same size",
    ),
    "cbam with another spatial part": (
        lambda: _with(partial(CbamModule, 32), lambda m: setattr(m, "spatial", nn.Identity())),
        "spatial is not a timm.layers.cbam.SpatialAttn",
    ),
    "no groups": (lambda: nn.ChannelShuffle(0), "groups is 0"),
    "float8": (lambda: se().to(torch.float8_e4m3fn), "fc1 has parameters of torch.float8"),
    "not finite": (lambda: _with(se, lambda m: m.fc1.weight.data.fill_(torch.nan)), "output is off by nan"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*quantized tensor creation")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_stays_and_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    classes = [type(m) for m in model.modules()]
    others = "torch.nn.modules.conv.*"  # depthwise ones in it
    report = convblocks.accelerate(model, exclude=others)
    assert not report.replaced
    (entry,) = [e for e in report.skipped if e.reason != "in exclude"]
    assert re.search(reason, entry.reason), entry.reason
    assert [type(m) for m in model.modules()] == classes
    assert entry.reason in str(report)
    with pytest.raises(RuntimeError, match="accelerate: expected to replace all"):
        convblocks.accelerate(model, exclude=others, strict=True)


def test_forward_of_the_class_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SEModule, "forward", lambda self, x: x)
    (entry,) = convblocks.accelerate(se()).skipped
    assert entry.reason == "the forward of its class is overridden"


def test_a_class_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new release of a library might, under the same names."""
    forward = SEModule.forward

    def other(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * 1.001

    other.__module__, other.__qualname__ = forward.__module__, forward.__qualname__
    monkeypatch.setattr(SEModule, "forward", other)
    (entry,) = convblocks.accelerate(se()).skipped
    assert "the replacement's output is off by" in entry.reason
    assert convblocks.accelerate(se(), verify="off").replaced


def test_only_the_gradient_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = SEModule.forward

    def other(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x.detach()) + x - x.detach()

    other.__module__, other.__qualname__ = forward.__module__, forward.__qualname__
    monkeypatch.setattr(SEModule, "forward", other)
    (entry,) = convblocks.accelerate(se()).skipped
    assert "the replacement's gradient is off by" in entry.reason


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_sharded_parameters(tmp_path: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        whole = nn.Sequential(se())
        fully_shard(whole, mesh=mesh)
        (entry,) = convblocks.accelerate(whole).skipped
        assert entry.reason == "fc1 has a DTensor for a parameter"
        alone = se()
        fully_shard(alone, mesh=mesh)
        (entry,) = convblocks.accelerate(alone).skipped
        assert "wrapped by FSDP" in entry.reason
        old = FullyShardedDataParallel(nn.Sequential(se()), device_id=torch.device("cpu"))
        (entry,) = convblocks.accelerate(old).skipped
        assert "inside an FSDP module" in entry.reason
    finally:
        torch.distributed.destroy_process_group()


def test_whole_network_of_refusals_keeps_its_numbers() -> None:
    model = timm.create_model("rexnet_100").eval()
    before = copy.deepcopy(model)
    report = convblocks.accelerate(model, exclude="torch.nn.*")
    assert any("it has a norm between its layers" in e.reason for e in report.skipped)
    assert not report.replaced
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), before(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: convblocks.accelerate(torch.randn(3)),
            TypeError,
            r"accelerate: expected a torch.nn.Module, got Tensor",
        ),
        (lambda: convblocks.accelerate(network(), backend="gpu"), ValueError, "expected a backend of auto, .* got gpu"),
        (lambda: convblocks.accelerate(network(), verify="all"), ValueError, "expected verify to be sample or off"),
        (lambda: convblocks.accelerate(network(), include="7", strict=True), RuntimeError, "include to match .* '7'"),
        (lambda: convblocks.revert("x"), TypeError, "revert: expected a torch.nn.Module, got str"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
