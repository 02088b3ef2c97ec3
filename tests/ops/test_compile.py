"""torch.compile, torch.export and AOTInductor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from convblocks import backends
from convblocks.opinfo import OPS, OpInfo
from tests.ops.common import SLOW, each_op, once, operator
from tests.ops.test_backends import python
from tests.ops.test_transforms import Layer


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A convolution before and after each of the given operations."""

    def __init__(self, *infos: OpInfo, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        layers = [Layer(info, width) for info in infos]
        self.layers = nn.ModuleList(
            nn.Sequential(layer, nn.Conv2d(layer.out_channels, width, 3, padding=1), nn.ReLU()) for layer in layers
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def _loss_and_gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net(x)
    return [y, *torch.autograd.grad(y.square().mean(), list(net.parameters()))]


@pytest.mark.parametrize("dynamic", [None] if SLOW else [True, None], ids=lambda d: "dynamic" if d else "automatic")
@each_op
def test_no_recompilation_for_other_sizes(info: OpInfo, dynamic: bool | None, backend: str, device: str) -> None:
    """Forward and backward in full graphs: two at most for four sizes."""
    net = Net(info, width=4).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch, size in ((2, 5), (3, 6), (4, 9), (3, 7)):
        x = torch.randn(batch, 3, size, size + 1, device=device)
        torch.testing.assert_close(_loss_and_gradients(compiled, x), _loss_and_gradients(net, x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@each_op
def test_inductor_copies_nothing_for_it(
    info: OpInfo, layout: torch.memory_format, dispatched: str, device: str
) -> None:
    """Between two convolutions the operator runs on what the first one wrote, and the second on what it wrote."""
    if backends.extension_error is not None:
        pytest.skip("the reference dissolves into ATen")
    net = Net(info).to(device, memory_format=layout).eval()
    x = torch.randn(2, 3, 14, 14, device=device).to(memory_format=layout)
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(net, fullgraph=True), x)
        torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)
    view = r"\[?(?:reinterpret_tensor\()?"  # of a list of maps: slices of what the convolution wrote
    call = re.search(rf"(\w+) = torch\.ops\.convblocks\.{info.name}\.default\({view}(\w+)", code)
    assert call is not None, code
    output, given = call.groups()
    assert re.search(rf"\b{given} = extern_kernels\.convolution\(", code), code
    names = "|".join([output, *re.findall(rf"(\w+) = {output}\b", code)])
    assert re.search(rf"extern_kernels\.convolution\(({names})\b", code), code


@once
def test_inductor_trains_all_operations() -> None:
    net = Net(*OPS.values())
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for size in (8, 13):
        x = torch.randn(2, 3, size, size)
        got, expected = _loss_and_gradients(compiled, x), _loss_and_gradients(net, x)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


LOAD = """
import sys, torch, convblocks
x = torch.load(sys.argv[1] + "/x.pt")
y = {load}(x)
torch.testing.assert_close(y, torch.load(sys.argv[1] + "/y.pt"), rtol=1e-4, atol=1e-5)
print(convblocks.backends.extension_error)
"""


def _export(net: nn.Module, device: str) -> torch.export.ExportedProgram:
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    return torch.export.export(net, (torch.randn(2, 3, 8, 8, device=device),), dynamic_shapes=dynamic)


def test_export_and_load(dispatched: str, device: str, tmp_path: Path) -> None:
    """A program of all operations keeps them, takes other sizes, and loads with and without the compiled part."""
    net = Net(*OPS.values()).to(device).eval()
    program = _export(net, device)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    if backends.extension_error is None:
        assert all(operator(info) in targets for info in OPS.values())
    x = torch.randn(3, 3, 9, 11, device=device)
    torch.testing.assert_close(program.module()(x), net(x))
    torch.export.save(program, tmp_path / "net.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), net(x))
    torch.save(x.cpu(), tmp_path / "x.pt")
    torch.save(net(x).detach().cpu(), tmp_path / "y.pt")
    if device == "cpu":
        code = LOAD.format(load="torch.export.load(sys.argv[1] + '/net.pt2').module()")
        done = python(code.replace("sys.argv[1]", repr(str(tmp_path))), CONVBLOCKS_BUILD="0")
        assert done.stdout == "CONVBLOCKS_BUILD=0\n", done.stderr


@once
def test_ahead_of_time_package(dispatched: str, device: str, tmp_path: Path) -> None:
    """A package of AOTInductor runs here, and in a process that has only the Python part."""
    net = Net(*OPS.values()).to(device).eval()
    package = torch._inductor.aoti_compile_and_package(_export(net, device), package_path=str(tmp_path / "net.pt2"))
    x = torch.randn(3, 3, 9, 11, device=device)
    with torch.no_grad():
        y = net(x)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), y, rtol=1e-4, atol=1e-5)
    torch.save(x.cpu(), tmp_path / "x.pt")
    torch.save(y.cpu(), tmp_path / "y.pt")
    if device == "cpu":
        code = LOAD.format(load="torch._inductor.aoti_load_package(sys.argv[1] + '/net.pt2')")
        done = python(code.replace("sys.argv[1]", repr(str(tmp_path))), CONVBLOCKS_BUILD="0")
        assert done.stdout == "CONVBLOCKS_BUILD=0\n", done.stderr
