"""The CUDA kernels of every operation, compiled for the CPU: faults, accuracy, bytes moved, any order of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import convblocks
from convblocks import backends
from convblocks.opinfo import OpInfo, Options, Size
from tests.gpu.emulator import ROOT, Emulator, build, sanitizers
from tests.gpu.proof import each_case, each_traffic, prove, prove_traffic

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # in the process that test_sanitizers starts


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """The CUDA kernels in the place of the CPU kernels, as long as this file's tests run."""
    if backends.extension_error is not None:
        pytest.skip(backends.extension_error)
    file = build(request.param)
    patch = pytest.MonkeyPatch()
    patch.setattr(backends, "_emulated_cuda", True)
    backends.emulate_cuda(file)
    with convblocks.use_backend("cuda"):
        yield Emulator(file)
    patch.undo()
    backends.load_kernels(backends._shared_object(f"_cpu_{backends.cpu_isa}"), "cpu")


@pytest.mark.parametrize("emulator", ["asan" if SANITIZED else "memory"], indirect=True)
@each_case
def test_faults_and_accuracy(
    info: OpInfo,
    options: Options,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    emulator: Emulator,
) -> None:
    start = info.options.index(options) + dtype.itemsize
    emulator.order(start)  # 2 or more: a random order of threads and blocks
    prove(info, options, dtype, parameter_dtype, emulator.watch, start)


@pytest.mark.skipif(SANITIZED, reason="the memory variant counts")
@pytest.mark.parametrize("emulator", ["memory"], indirect=True)
@each_traffic
def test_traffic(info: OpInfo, size: Size, dtype: torch.dtype, layout: str, backward: bool, emulator: Emulator) -> None:
    prove_traffic(info, size, dtype, layout, backward, emulator.watch)


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="is that process")
def test_sanitizers() -> None:
    """The same in a process under AddressSanitizer and UndefinedBehaviorSanitizer, which end it at a fault."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    build("asan")
    result = subprocess.run(command, env=sanitizers(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
