"""torch.compile, torch.export, torch.jit.trace, FX and two processes of DistributedDataParallel."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import convblocks
from tests.accelerate.sources import CHANNELS, InvertedResidual, made, network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def model() -> nn.Module:
    model = network().eval()
    convblocks.accelerate(model, strict=True)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 14, 14)


def test_compile(model: nn.Module, x: Tensor) -> None:
    torch.compiler.reset()
    expected = model(x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y.square().sum(), list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_compile_with_inductor(model: nn.Module, x: Tensor) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)


def test_accelerated_after_compile_is_not_stale(x: Tensor) -> None:
    """What is accelerated behind the back of a compiled model is compiled anew."""
    torch.compiler.reset()
    model = network().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(x)
    convblocks.accelerate(model, strict=True)
    torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-5)
    convblocks.revert(model)
    assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("named", ["reference", "cpu"])
def test_compile_on_a_named_backend(named: str, x: Tensor) -> None:
    if (reason := convblocks.why_not("eca", named, x)) is not None:
        pytest.skip(f"{named} cannot run: {reason}")
    torch.compiler.reset()
    model = network().eval()
    before = model(x)
    convblocks.accelerate(model, backend=named, strict=True)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), before, rtol=1e-4, atol=1e-5)


def test_export(model: nn.Module, x: Tensor) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(5, 3, 14, 14)
    torch.testing.assert_close(program.module()(other), model(other))
    assert set(program.state_dict) == set(model.state_dict())


def test_jit_trace(model: nn.Module, x: Tensor) -> None:
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    assert set(traced.state_dict()) == set(model.state_dict())
    with torch.no_grad():  # the weights are those of the traced module, not constants
        traced.get_submodule("2").fc1.weight.zero_()
    torch.testing.assert_close(traced(x), model(x))


def test_fx(model: nn.Module, x: Tensor) -> None:
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))
    assert dict(graph.named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("stride", [1, 2])
def test_units_that_call_their_branches(stride: int) -> None:
    torch.compiler.reset()
    unit = made(lambda: InvertedResidual(CHANNELS, CHANNELS * stride, stride)).eval()
    convblocks.accelerate(unit, strict=True)
    x = torch.randn(2, CHANNELS, 7, 6)
    expected = unit(x)
    program = torch.export.export(unit, (x,)).module()
    for traced in (torch.compile(unit, fullgraph=True), program, torch.fx.symbolic_trace(unit)):
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)


def _train(rank: int, folder: str, inputs: Tensor, state: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for order in ("accelerated first", "wrapped first"):
        model = network().eval()
        model.load_state_dict(state)
        if order == "accelerated first":
            convblocks.accelerate(model, strict=True)
        parallel = DistributedDataParallel(model)
        convblocks.accelerate(parallel, strict=True)
        parallel(inputs[rank]).square().mean().backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{order} {rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    model, inputs = network().eval(), torch.randn(2, 2, 3, 14, 14)
    torch.multiprocessing.spawn(_train, (str(tmp_path), inputs, copy.deepcopy(model.state_dict())), nprocs=2)
    model(inputs.flatten(0, 1)).square().mean().backward()
    files = list(tmp_path.glob("*.pt"))
    assert len(files) == 4
    for file in files:
        grads = torch.load(file, weights_only=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
