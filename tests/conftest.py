"""Which backends are tested, and what every test starts from.

CONVBLOCKS_TEST_BACKENDS  comma list, "reference,cpu" if unset. Triton on a machine without a GPU needs a process with
                          TRITON_INTERPRET=1.
CONVBLOCKS_TEST_CUDA      shared object of csrc/cuda compiled for the CPU: "cuda" then runs on it.
CONVBLOCKS_REQUIRE_EXT=1  a backend under test that cannot run is an error; else its tests are skipped.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is loaded: threads that spin while idle slow small tests twentyfold on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor's cache does not tell apart graphs that are compiled for different instruction sets.
if isa := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"convblocks-inductor-{isa}"))

import pytest
import torch
from hypothesis import HealthCheck, settings

import convblocks
from convblocks import backends

BACKENDS = tuple(os.environ.get("CONVBLOCKS_TEST_BACKENDS", "reference,cpu").split(","))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("CONVBLOCKS_TEST_CUDA")

logging.getLogger("torch.__trace").propagate = False  # else each failure is reported under thousands of lines of it

settings.register_profile(
    "convblocks",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("convblocks")

if EMULATED and backends.extension_error is None:
    backends.emulate_cuda(Path(EMULATED))
if INTERPRETED and "triton" in BACKENDS:
    from tests.gpu import triton_checker  # bf16 as on a GPU; faults found in every launch

    triton_checker.install()


def why_not(backend: str) -> str | None:
    """Why no operation can run on the backend here, or None."""
    reasons = [convblocks.why_not(name, backend) for name in backends.operators]
    return reasons[0] if all(reasons) else None


def device_of(backend: str) -> str:
    """The device whose tensors the backend takes here; "cpu" also for the interpreter and the emulator."""
    name = next(iter(backends.operators))
    return "cpu" if convblocks.why_not(name, backend, torch.empty(0)) is None else "cuda"


def pytest_configure(config: pytest.Config) -> None:
    """Slow tests run only where -m asks for them; a backend that cannot be tested is named before anything runs."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    unknown = [b for b in BACKENDS if b not in backends.BACKENDS or b == "auto"]
    if unknown:
        allowed = ", ".join(b for b in backends.BACKENDS if b != "auto")
        raise pytest.UsageError(f"CONVBLOCKS_TEST_BACKENDS: expected some of {allowed}, got {', '.join(unknown)}")
    missing = {b: reason for b in BACKENDS if (reason := why_not(b)) is not None}
    if missing and os.environ.get("CONVBLOCKS_REQUIRE_EXT") == "1":
        raise pytest.UsageError("; ".join(f"backend {b} cannot run: {reason}" for b, reason in missing.items()))


def pytest_report_header() -> list[str]:
    lines = [f"convblocks {convblocks.__version__}, torch {torch.__version__}, backends under test:"]
    for b in BACKENDS:
        how = {"cpu": backends.cpu_isa, "triton": "interpreted" if INTERPRETED else "", "cuda": EMULATED or ""}.get(b)
        reason = why_not(b)
        lines.append(f"  {b}: {f'ok {how or str()}' if reason is None else f'!!! NOT TESTED, it cannot run: {reason}'}")
    return lines


@pytest.fixture(autouse=True)
def _fixed_start() -> Iterator[None]:
    """Fixed seeds, and no state of torch carried from one test to the next."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend under test, chosen while the test runs."""
    name: str = request.param
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name} cannot run: {reason}")
    with convblocks.use_backend(name):
        yield name


@pytest.fixture
def dispatched(backend: str) -> str:
    """The backend, where torch.ops.convblocks runs it: not the reference beside a compiled part."""
    if (backend == "reference") != (backends.extension_error is not None):
        pytest.skip("torch.ops.convblocks does not run it here")
    return backend


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)
