"""What a model goes through after it was accelerated: copies, files, hooks, surgery, and the way back."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import convblocks
from convblocks.ops.squeeze_excite import operator as squeeze_excite_operator
from tests.accelerate.sources import (
    CHANNELS,
    EcaModule,
    SEModule,
    SqueezeExcitation,
    each_source,
    made,
    network,
    timm,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model() -> nn.Module:
    return network().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 14, 14)


def _classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@each_source
def test_revert_is_exact(make: Callable[[], nn.Module]) -> None:
    module, x = made(make), torch.randn(2, CHANNELS, 6, 6)
    before, attributes, y = _classes(module), set(module.__dict__), module(x)
    convblocks.accelerate(module, strict=True)
    assert isinstance(module, before[0])
    convblocks.revert(module)
    assert _classes(module) == before
    assert set(module.__dict__) == attributes
    assert torch.equal(module(x), y)
    convblocks.revert(module)  # does nothing to a model that is as it was
    assert _classes(module) == before


def test_weights_keys_and_gradients_stay_where_they_are(model: nn.Module, x: Tensor) -> None:
    names = [name for name, _ in model.named_modules()]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    convblocks.accelerate(model, strict=True)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(x).sum().backward()
    assert all(p.grad is not None for p in parameters)
    assert "FastSEModule" in repr(model)
    other = network().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other(x), model(x))
    model.load_state_dict(network().state_dict(), strict=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


def test_accelerating_leaves_no_trace(model: nn.Module) -> None:
    model.train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_hook(lambda grad: pytest.fail("a gradient hook ran"))
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu"):
        convblocks.accelerate(model, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_frozen_parameters_and_inference_mode(x: Tensor) -> None:
    frozen = network().eval().requires_grad_(False)
    convblocks.accelerate(frozen, strict=True)
    assert not frozen(x).requires_grad
    with torch.inference_mode():
        made_in_inference = network().eval()
        before = made_in_inference(x)
        convblocks.accelerate(made_in_inference, strict=True)
        torch.testing.assert_close(made_in_inference(x), before)


def test_deepcopy_and_ema(model: nn.Module, x: Tensor) -> None:
    convblocks.accelerate(model, strict=True)
    before = model(x)
    twin = copy.deepcopy(model)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), before)
    assert _classes(twin) == _classes(ema.module) == _classes(model)
    assert torch.equal(ema.module(x), before)
    model.load_state_dict(twin.state_dict())
    ema.update(model)
    assert not torch.equal(ema.module(x), before)
    convblocks.revert(twin)
    assert convblocks.is_accelerated(model[2])
    assert not convblocks.is_accelerated(twin[2])


def test_saved_model_loads_in_a_new_process(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    """Where nothing was accelerated before: the class is made on demand."""
    model = nn.Sequential(*(m for m in model if not isinstance(m, SEModule)), EcaModule(CHANNELS)).eval()
    convblocks.accelerate(model, strict=True, backend="reference")
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    code = """if True:
        import sys, torch
        d = torch.load(sys.argv[1], weights_only=False)
        assert torch.equal(d["model"](d["x"]), d["y"])
        import convblocks
        assert [type(m).__name__ for m in d["model"] if convblocks.is_accelerated(m)] == [
            "FastEcaModule_reference", "FastSqueezeExcitation_reference", "FastEcaModule_reference"]
        convblocks.revert(d["model"])
        torch.testing.assert_close(d["model"](d["x"]), d["y"])
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, cwd=ROOT)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_pickled_alone() -> None:
    module, x = SEModule(CHANNELS, act_layer=nn.SiLU), torch.randn(1, CHANNELS, 4, 4)
    convblocks.accelerate(module, strict=True)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


class _Doubled(nn.Conv2d):
    @classmethod
    def of(cls, layer: nn.Module) -> nn.Module:
        layer.__class__ = cls
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


SURGERY: dict[str, Callable[[Any], object]] = {
    "pruned": lambda m: prune.l1_unstructured(m.fc1, "weight", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m.fc2, "weight", nn.Tanh()),
    "weight norm": lambda m: parametrizations.weight_norm(m.fc1),
    "old spectral norm": lambda m: nn.utils.spectral_norm(m.fc2),
    "hooked": lambda m: m.fc1.register_forward_hook(lambda module, args, y: 2 * y),
    "pre-hooked": lambda m: m.fc2.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "own forward": lambda m: setattr(m.fc1, "forward", lambda x: nn.Conv2d.forward(m.fc1, x) * 2),
    "wrapped layer": lambda m: setattr(m, "fc1", nn.Sequential(m.fc1, nn.LeakyReLU(0.5))),
    "wrapped layer, underhand": lambda m: m._modules.update(fc1=nn.Sequential(m.fc1, nn.LeakyReLU(0.5))),
    "new layer": lambda m: setattr(m, "fc1", nn.Conv2d(CHANNELS, 8, 1)),
    "new activation": lambda m: setattr(m, "act", nn.Mish()),
    "new activation, added": lambda m: m.add_module("act", nn.Mish()),
    "subclass of a layer, underhand": lambda m: m._modules.update(fc1=_Doubled.of(m.fc1)),
    "new gate": lambda m: setattr(m, "gate", nn.Tanh()),
    "a norm": lambda m: setattr(m, "bn", nn.BatchNorm2d(8)),
    "maximum": lambda m: setattr(m, "add_maxpool", True),
    "no bias": lambda m: setattr(m.fc1, "bias", None),
    "frozen": lambda m: m.fc1.requires_grad_(False),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("change", SURGERY.values(), ids=SURGERY.keys())
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_surgery_afterwards_is_heeded(change: Callable[[Any], object]) -> None:
    """A replaced module that is changed computes what the original would, changed in the same way."""
    module = made(lambda: SEModule(CHANNELS))
    fast = copy.deepcopy(module)
    convblocks.accelerate(fast, strict=True)
    for m in (module, fast):
        torch.manual_seed(1)
        change(m)
    x = torch.randn(2, CHANNELS, 6, 6, dtype=next(module.parameters()).dtype)
    before, after = module(x), fast(x)
    torch.testing.assert_close(after, before)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(before.square().sum(), parameters)
    fast_grads = torch.autograd.grad(after.square().sum(), [p for p in fast.parameters() if p.requires_grad])
    for a, b in zip(fast_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_functional_call_and_stacked_ensembles(x: Tensor) -> None:
    models = [network().eval() for _ in range(3)]
    before = torch.stack([m(x) for m in models])
    for m in models:
        convblocks.accelerate(m, strict=True)
    parameters, buffers = torch.func.stack_module_state(models)
    after = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_named_backend(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    reference = squeeze_excite_operator.reference
    monkeypatch.setattr(squeeze_excite_operator, "reference", lambda *a: calls.append(a) or reference(*a))
    before = model(x)
    report = convblocks.accelerate(model, backend="reference", verify="off")
    assert {e.backend for e in report.replaced} == {"reference"}
    torch.testing.assert_close(model(x), before)
    assert len(calls) == 2
    assert type(model[2]).__name__ == "FastSEModule_reference"


def test_backend_that_cannot_run() -> None:
    model = network()
    classes = _classes(model)
    with pytest.raises(RuntimeError, match="accelerate: expected squeeze_excite to run on backend cuda, got none: "):
        convblocks.accelerate(model, backend="cuda")
    assert _classes(model) == classes


def test_use_backend_is_heeded(backend: str, device: str, model: nn.Module, x: Tensor) -> None:
    model, x = model.to(device), x.to(device)
    before = model(x)
    report = convblocks.accelerate(model, strict=True)
    assert {e.backend for e in report.replaced} == {backend}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_report(model: nn.Module) -> None:
    model[2].fc1.register_forward_hook(print)
    dry = convblocks.accelerate(model, dry_run=True)
    assert not any(map(convblocks.is_accelerated, model.modules()))
    assert "2 of 3 candidates in Sequential would be replaced" in str(dry)
    report = convblocks.accelerate(model)
    assert [e.name for e in report.replaced] == ["4", "6"]
    assert [(e.name, e.reason) for e in report.skipped] == [("2", "fc1 has hooks")]
    assert all(e.error < 1e-5 for e in report.replaced)
    assert [e.operation for e in report.entries] == ["squeeze_excite", "eca", "squeeze_excite"]
    table = str(report).splitlines()
    assert table[0].split() == ["module", "class", "operation", "backend", "result", "remark"]
    assert table[2].split()[:2] == ["2", "timm.layers.squeeze_excite.SEModule"]
    assert "2 of 3 candidates in Sequential replaced" in table[-1]
    data = json.loads(report.to_json())
    assert [e["replaced"] for e in data["entries"]] == [False, True, True]
    again = convblocks.accelerate(model, strict=False)
    assert [e.reason for e in again.skipped] == ["fc1 has hooks", "already accelerated", "already accelerated"]


def test_choice(model: nn.Module) -> None:
    def replaced(**how: Any) -> list[str]:
        return [e.name for e in convblocks.accelerate(model, dry_run=True, strict=True, **how).replaced]

    assert replaced() == ["2", "4", "6"]
    assert replaced(include="timm.*") == ["2", "4"]
    assert replaced(include=["2", "torchvision.*"]) == ["2", "6"]
    assert replaced(exclude="*.EcaModule") == ["2", "6"]
    assert replaced(filter_fn=lambda module, name: name != "2") == ["4", "6"]
    report = convblocks.accelerate(model, include="[24]", exclude="4")
    assert [e.reason for e in report.skipped] == ["in exclude", "not in include"]


def test_nothing_to_replace() -> None:
    report = convblocks.accelerate(nn.Sequential(nn.Conv2d(3, 8, 3)), strict=True)
    assert str(report) == "accelerate: nothing to replace: Sequential has no module of a known class"
    assert report.entries == report.replaced == report.skipped == []
    assert json.loads(report.to_json())["entries"] == []


def test_the_model_itself_and_shared_modules() -> None:
    shared = SEModule(CHANNELS)
    report = convblocks.accelerate(nn.ModuleList([shared, shared]))
    assert [e.name for e in report.replaced] == ["0"]
    assert convblocks.is_accelerated(shared)
    report = convblocks.accelerate(SqueezeExcitation(8, 2))
    assert [e.name for e in report.replaced] == [""]
    assert "(model)" in str(report)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = network()
    report = convblocks.accelerate(model, strict=True)
    assert {e.reason for e in report.replaced} == {"not compared: it has no data (meta device)"}
    assert model(torch.empty(2, 3, 14, 14, device="meta")).shape == (2, CHANNELS, 10, 10)


def test_strict_changes_nothing_when_it_fails(model: nn.Module) -> None:
    model[4].conv.register_forward_hook(print)
    classes = _classes(model)
    with pytest.raises(RuntimeError, match=r"accelerate: expected to replace all .* 4: conv has hooks"):
        convblocks.accelerate(model, strict=True)
    assert _classes(model) == classes


def test_foreign_libraries_are_not_imported_and_the_function_hides_its_package() -> None:
    code = """if True:
        import sys
        import convblocks
        foreign = {"timm", "torchvision", "segmentation_models_pytorch", "triton", "rich"} & set(sys.modules)
        assert not foreign, foreign
        import convblocks.accelerate.report
        from convblocks.accelerate import Report
        from torch import nn
        assert isinstance(convblocks.accelerate(nn.Conv2d(1, 1, 1)), Report)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_replicas_of_data_parallel() -> None:
    module = made(lambda: SEModule(CHANNELS))
    convblocks.accelerate(module, strict=True)
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copied = child._replicate_for_data_parallel()
        for key, parameter in child.named_parameters():
            setattr(copied, key, parameter.detach())
        setattr(replica, name, copied)
    x = torch.randn(2, CHANNELS, 6, 6)
    torch.testing.assert_close(replica(x), module(x))
    assert type(replica) is type(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda: SEModule(CHANNELS), lambda: EcaModule(CHANNELS)], ids=["se", "eca"])
def test_any_dtypes_under_autocast(
    make: Callable[[], nn.Module], dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    module, x = made(make).to(parameter_dtype), torch.randn(2, CHANNELS, 6, 6).to(dtype)
    fast = copy.deepcopy(module)
    convblocks.accelerate(fast, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = module(x), fast(x)
    assert before.dtype == after.dtype
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


def test_a_parametrized_replacement_is_never_stripped() -> None:
    """Neither by revert, which then reverts nothing at all, nor by the exchange of a child."""
    model = nn.Sequential(made(lambda: SEModule(CHANNELS)), made(lambda: SEModule(CHANNELS)))
    convblocks.accelerate(model, strict=True)
    model[1].register_parameter("extra", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(model[1], "extra", nn.Tanh())
    classes = _classes(model)
    for act in (lambda: convblocks.revert(model), lambda: setattr(model[1], "act", nn.Mish())):
        with pytest.raises(RuntimeError, match="revert: expected a replaced module as accelerate"):
            act()
        assert _classes(model) == classes


def test_triton_is_chosen_for_the_process_only() -> None:
    with pytest.raises(ValueError, match="accelerate: expected a backend of auto, reference, cpu, cuda, got triton"):
        convblocks.accelerate(network(), backend="triton")
