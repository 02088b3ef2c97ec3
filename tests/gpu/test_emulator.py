"""The CUDA checkers find every planted fault of faults.cu, and none in its clean kernels."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.gpu.emulator import HERE, ROOT, Emulator, build, sanitizers

SOURCE = [HERE / "faults.cu"]
ORDERS = (0, 1, 7)  # forward, backward, random


def _call(emulator: Emulator, name: str, x: Tensor, y: Tensor, n: int | None = None) -> str | None:
    function = emulator.library[name]
    function.restype = ctypes.c_char_p
    text = function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), len(x) if n is None else n)
    return None if text is None else text.decode()


@pytest.fixture(scope="module")
def plain() -> Emulator:
    return Emulator(build("plain", SOURCE, "faults"))


@pytest.fixture(scope="module")
def memory() -> Emulator:
    return Emulator(build("memory", SOURCE, "faults"))


def _votes(x: Tensor) -> Tensor:
    lanes = (x > 0).view(-1, 32).float()
    before = lanes.cumsum(1) - lanes
    before[:, :16] += before[:, :1]
    return before.flatten()


CLEAN = {  # the function, the number of elements, and the result
    "clean_scale": (250, lambda x: 2 * x),
    "clean_scale_vectors": (252, lambda x: 2 * x),
    "clean_sum": (128, lambda x: x.sum().expand(128)),
    "clean_reverse": (128, lambda x: x.view(-1, 32).flip(1).flatten()),
    "clean_votes": (128, _votes),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernel_is_right_in_every_order(plain: Emulator, name: str, order: int) -> None:
    n, expected = CLEAN[name]
    x = torch.randn(n)
    y = torch.full_like(x, float("nan"))
    plain.order(order)
    assert _call(plain, name, x, y) is None
    assert plain.reports() == ""
    torch.testing.assert_close(y, expected(x))


@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernel_has_no_report(memory: Emulator, name: str) -> None:
    n, expected = CLEAN[name]
    x = torch.randn(2 * n + 1).as_strided((n,), (1,), 0)
    y = torch.full_like(x, float("nan"))
    with memory.watch(x, outputs=[y]):
        assert _call(memory, name, x, y) is None
    torch.testing.assert_close(y, expected(x))


def test_traffic(memory: Emulator) -> None:
    x, y = torch.randn(256), torch.empty(256)
    for name in ("clean_scale", "clean_scale_vectors"):
        with memory.watch(x, outputs=[y]) as traffic:
            _call(memory, name, x, y)
        assert (traffic.loaded, traffic.stored, traffic.moved) == (1024, 1024, 2048)
    with memory.watch(x, outputs=[y]) as traffic:
        _call(memory, "clean_count", x, y)  # each of two blocks updates one sector
    assert (traffic.loaded_sectors, traffic.stored_sectors) == (32, 2)


FAULTS = {  # the function, and what the report must say
    "one_past_the_end": "out of bounds: load of 4 bytes at faults.cu:",
    "store_past_the_end": "out of bounds: store of 4 bytes at faults.cu:",
    "store_to_input": "store to an input: store of 4 bytes at faults.cu:",
    "missing_barrier": "race in shared memory: load at faults.cu:",
    "missing_second_barrier": "race in shared memory: load at faults.cu:",
    "missing_syncwarp": "race in shared memory: ",
    "divergent_barrier": "divergent barrier in block (0, 0, 0): 64 threads returned; 64 threads wait at __syncthreads",
    "two_barriers": "divergent barrier in block (0, 0, 0): threads wait at faults.cu:",
    "divergent_shuffle": "divergent warp operation in block (0, 0, 0), warp 0: lane 0 is at faults.cu:",
    "shuffle_outside_mask": "lane 0 reads lane 16, which takes no part in it",
    "not_in_own_mask": "lane 31 is not in its own mask",
    "misaligned": "misaligned: load of 16 bytes at faults.cu:",
    "dynamic_overrun": "0 bytes past the end of dynamic shared memory of 512 bytes",
}
BLOCKS = {  # the same with two blocks
    "two_blocks_one_address": "race in global memory: store at faults.cu:",
    "block_reads_another": "race in global memory: load at faults.cu:",
    "atomic_and_store": "race in global memory: atomic at faults.cu:",
}


@pytest.mark.parametrize("name", [*FAULTS, *BLOCKS])
def test_fault_is_found(memory: Emulator, name: str) -> None:
    n = 128 if name in FAULTS else 256
    if name == "store_past_the_end":
        n -= 1
    x, y = torch.randn(n + 1)[:n], torch.empty(n)  # inside a larger storage: only the view's elements are allowed
    with pytest.raises(AssertionError) as report, memory.watch(x, outputs=[y]):
        assert _call(memory, name, x, y) is not None  # the launch fails as well
    assert {**FAULTS, **BLOCKS}[name] in str(report.value)


def test_gaps_between_the_elements_of_a_view_are_out_of_bounds(memory: Emulator) -> None:
    x, y = torch.randn(256)[::2], torch.empty(128)
    with pytest.raises(AssertionError, match="between the elements of a view"), memory.watch(x, outputs=[y]):
        _call(memory, "clean_scale", x, y)


def test_freed_memory_is_out_of_bounds(memory: Emulator) -> None:
    y = torch.empty(128)

    def use_after_free() -> None:
        with memory.watch(outputs=[y]):
            x = torch.empty(128)
            address = x.data_ptr()
            assert _call(memory, "clean_scale", x, y) is None
            del x
            memory.library["clean_scale"](ctypes.c_void_p(address), ctypes.c_void_p(y.data_ptr()), 128)

    with pytest.raises(AssertionError, match="out of bounds: load"):
        use_after_free()


def test_allocations_start_as_nan(memory: Emulator) -> None:
    with memory.watch():
        assert torch.empty(5).isnan().all()
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()


DIVERGENCE = [name for name in FAULTS if "diver" in name or "barriers" in name or "mask" in name]


@pytest.mark.parametrize("name", DIVERGENCE)
def test_plain_build_finds_divergence(plain: Emulator, name: str) -> None:
    x, y = torch.randn(128), torch.empty(128)
    assert FAULTS[name] in str(_call(plain, name, x, y))
    assert FAULTS[name] in plain.reports()
    assert _call(plain, "clean_scale", x, y) is None  # the next launch runs


@pytest.mark.parametrize("name", ["missing_barrier", "missing_second_barrier", "missing_syncwarp"])
def test_missing_order_shows_in_some_order_of_threads(plain: Emulator, name: str) -> None:
    x, results = torch.randn(128), []
    for order in ORDERS:
        plain.order(order)
        y = torch.empty(128)
        _call(plain, name, x, y)
        results.append(y)
    assert not all(torch.equal(r, results[0]) for r in results)


def test_shared_memory_starts_as_nan_in_every_block(plain: Emulator) -> None:
    x, y = torch.ones(256), torch.zeros(256)
    _call(plain, "clean_sum", x, y)
    _call(plain, "uninitialised_shared", x, y)
    assert y.isnan().all()


def test_limits_of_shared_memory(plain: Emulator) -> None:
    x, y = torch.randn(128), torch.zeros(128)
    assert "49153 bytes of dynamic shared memory" in str(_call(plain, "too_much_shared_memory", x, y))
    assert not y.any()  # it did not run
    assert _call(plain, "opted_in", x, y, 227 << 10) is None
    assert "at most 232448" in str(_call(plain, "opted_in", x, y, (227 << 10) + 1))


@pytest.fixture(scope="module")
def preloaded() -> dict[str, str]:
    return sanitizers()


SANITIZED = {
    "one_past_the_end": "heap-buffer-overflow",
    "store_past_the_end": "heap-buffer-overflow",
    "dynamic_overrun": "heap-buffer-overflow",
    "static_overrun": "out of bounds for type 'float [128]'",
    "misaligned": "which requires 16 byte alignment",
    "integer_overflow": "signed integer overflow",
    "clean_sum": "",
    "clean_votes": "",
}


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers(preloaded: dict[str, str], name: str) -> None:
    n = 127 if name == "store_past_the_end" else 128
    library = build("asan", SOURCE, "faults")
    command = "import ctypes, sys; libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
    command += f"x, y = (ctypes.c_void_p(libc.malloc({4 * n})) for _ in 'xy')\n"
    command += f"sys.exit(ctypes.CDLL({str(library)!r}).{name}(x, y, {n}))"
    result = subprocess.run([sys.executable, "-c", command], env=preloaded, cwd=ROOT, capture_output=True, text=True)
    expected = SANITIZED[name]
    assert (result.returncode != 0) == bool(expected), result.stderr
    assert expected in result.stderr, result.stderr
    assert not expected or "faults.cu:" in result.stderr, result.stderr
