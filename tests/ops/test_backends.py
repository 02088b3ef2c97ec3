"""The choice of a backend: by context, by environment, by itself; and the reason where it cannot run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

import convblocks
from convblocks import backends
from convblocks.opinfo import OPS, OpInfo
from tests.conftest import INTERPRETED
from tests.ops.common import each_op, once


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = ("CONVBLOCKS_BACKEND", "CONVBLOCKS_BUILD", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in unset}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=300, check=False)


def test_an_unknown_name_is_refused_with_the_allowed_ones() -> None:
    words = "^convblocks: expected a backend of auto, reference, cpu, triton, cuda, got rocm$"
    with pytest.raises(ValueError, match=words), convblocks.use_backend("rocm"):
        pass
    with pytest.raises(ValueError, match=words):
        convblocks.why_not("simam", "rocm")
    assert backends.selected == "auto"


def test_an_unknown_operation_is_refused_with_the_known_ones() -> None:
    names = ", ".join(backends.operators)
    with pytest.raises(ValueError, match=f"^convblocks: expected an operation of {names}, got nothing$"):
        convblocks.why_not("nothing", "cpu")


def test_contexts_nest_and_end_after_an_error() -> None:
    with convblocks.use_backend("reference"):
        with convblocks.use_backend("auto"):
            assert backends.selected == "auto"
        assert backends.selected == "reference"
        with pytest.raises(KeyError), convblocks.use_backend("cpu"):
            raise KeyError
        assert backends.selected == "reference"
    assert backends.selected == "auto"


def test_contexts_of_two_threads_may_overlap() -> None:
    first, second = convblocks.use_backend("reference"), convblocks.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.selected == "cpu"
    second.__exit__(None, None, None)
    assert backends.selected == "auto"


@pytest.mark.skipif(not INTERPRETED, reason="Triton runs here on its interpreter only")
@each_op
def test_a_context_inside_tritons_takes_its_kernels_out(info: OpInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = info.sample((1, 4, 3, 3))
    module = importlib.import_module(f"convblocks.kernels.{info.name}")
    kernel, calls = getattr(module, info.name), []
    monkeypatch.setattr(module, info.name, lambda *args: calls.append(args) or kernel(*args))
    with convblocks.use_backend("triton"):
        info.op(*sample.args, **sample.kwargs)
        assert len(calls) == 1
        for name in ("auto", "cpu"):
            with convblocks.use_backend(name):
                info.op(*sample.args, **sample.kwargs)
        assert len(calls) == 1
        info.op(*sample.args, **sample.kwargs)
    assert len(calls) == 2


@pytest.mark.parametrize("name", [b for b in backends.BACKENDS if b not in ("auto", "reference")])
@each_op
def test_a_named_backend_runs_or_says_why_not(info: OpInfo, name: str) -> None:
    sample = info.sample((2, 8, 3, 3))
    reason = convblocks.why_not(info.name, name, sample.x)
    with convblocks.use_backend(name):
        if reason is None:
            assert backends.which(info.name, sample.x) == name
            info.op(*sample.args, **sample.kwargs)
        else:
            assert reason
            with pytest.raises(RuntimeError) as caught:
                info.op(*sample.args, **sample.kwargs)
            assert str(caught.value) == f"{info.name}: expected to run on backend {name}, got none: {reason}"


@each_op
def test_auto_runs_on_what_it_says(info: OpInfo) -> None:
    sample = info.sample((2, 8, 3, 3))
    taken = backends.which(info.name, sample.x)
    assert convblocks.why_not(info.name, taken, sample.x) is None
    with convblocks.use_backend(taken):
        named = info.op(*sample.args, **sample.kwargs)
    assert torch.equal(info.op(*sample.args, **sample.kwargs), named)


@once
def test_environment_chooses_for_the_process() -> None:
    code = "import convblocks; print(convblocks.backends.selected)"
    chosen = python(code, CONVBLOCKS_BACKEND="reference")
    assert chosen.stdout == "reference\n"
    assert "Exception ignored" not in chosen.stderr  # at the end of the process
    assert python(code).stdout == "auto\n"
    refused = python(code, CONVBLOCKS_BACKEND="fast")
    assert refused.returncode != 0
    words = "CONVBLOCKS_BACKEND: expected a backend of auto, reference, cpu, triton, cuda, got fast"
    assert words in refused.stderr


@once
def test_without_the_compiled_part_everything_is_the_reference() -> None:
    code = """
import torch, convblocks
from convblocks.opinfo import OPS
for info in OPS.values():
    sample = info.sample((2, 8, 5, 5), requires_grad=True)
    y = info.op(*sample.args, **sample.kwargs)
    assert torch.equal(y, info.reference(*sample.args, **sample.kwargs))
    y.sum().backward()
    assert convblocks.backends.which(info.name, sample.x) == "reference"
    assert convblocks.why_not(info.name, "cpu") == "CONVBLOCKS_BUILD=0"
try:
    with convblocks.use_backend("cpu"):
        info.op(*sample.args, **sample.kwargs)
except RuntimeError as e:
    print(e)
"""
    done = python(code, CONVBLOCKS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{list(OPS)[-1]}: expected to run on backend cpu, got none: CONVBLOCKS_BUILD=0\n"


@once
def test_import_does_not_load_what_it_does_not_need() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import convblocks
new = {m.split('.')[0] for m in set(sys.modules) - before}
print(*sorted(new & {"triton", "timm", "torchvision", "rich", "numpy", "hypothesis", "pytest"}))
"""
    done = python(code)
    assert done.stdout.strip() == "", done.stderr


def test_an_operation_that_an_older_build_lacks_is_the_reference_and_says_why() -> None:
    code = """if True:
        import pytest, torch, convblocks
        from convblocks.ops.operator import Operator
        newer = Operator("newer", "(Tensor x) -> Tensor", lambda x: None, lambda x: 2 * x)
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        newer(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))
        assert convblocks.backends.which("newer", x) == "reference"
        assert "without newer: build it again" in convblocks.why_not("newer", "cpu", x)
        with convblocks.use_backend("triton"), pytest.raises(RuntimeError, match="build it again"):
            newer(x)
        convblocks.ops.simam(x)
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
