"""The checker over Triton's interpreter finds every planted fault, and none in clean kernels."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.gpu import triton_checker
from tests.gpu.traffic import Traffic

triton_checker.install()

B = tl.constexpr(32)


@triton.jit
def copy(x, y, n, masked: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if masked:
        tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)
    else:
        tl.store(y + i, tl.load(x + i))


@triton.jit
def shifted(x, y, by):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + by + i))


@triton.jit
def add_neighbour(x, y, n):
    i = tl.program_id(0) * B + tl.arange(0, B)
    right = tl.load(x + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(y + i, tl.load(x + i, mask=i < n) + right, mask=i < n)


@triton.jit
def overlap(y, n):
    i = tl.program_id(0) * (B - 1) + tl.arange(0, B)
    tl.store(y + i, tl.full((B,), 1.0, tl.float32), mask=i < n)


@triton.jit
def store_and_update(y):
    if tl.program_id(0) == 0:
        tl.store(y, 0.0)
    tl.atomic_add(y, 1.0)


@triton.jit
def load_and_update(x, y):
    tl.atomic_add(x, 1.0)
    tl.store(y + tl.program_id(0), tl.load(x))


@triton.jit
def pairs_to_one_address(y):
    i = tl.arange(0, B)
    tl.store(y + i // 2, i.to(tl.float32))


@triton.jit
def total(x, y, n, defined: tl.constexpr):
    i = tl.arange(0, B)
    values = tl.load(x + i, mask=i < n, other=0.0) if defined else tl.load(x + i, mask=i < n)
    tl.store(y, tl.sum(values, 0))


@triton.jit
def walk_twice(x, y, n, block: tl.constexpr):
    i = tl.arange(0, block)
    for _ in range(2):
        for first in range(0, n, block):
            tl.store(y + first + i, tl.load(x + first + i))


@triton.jit
def store_then_load(y):
    i = tl.arange(0, B)
    for _ in range(2):
        tl.store(y + i, tl.load(y + i) + 1)


def _fault(run: Callable[[], object], *inputs: Tensor) -> str:
    with pytest.raises(AssertionError) as fault, triton_checker.watch(*inputs):
        run()
    return str(fault.value)


def test_clean_kernels() -> None:
    x, y = torch.randn(100), torch.zeros(100)
    with triton_checker.watch(x) as traffic:
        copy[(4,)](x, y, 100, masked=True)
    assert torch.equal(x, y)
    assert traffic == Traffic(loaded=400, stored=400, loaded_sectors=13, stored_sectors=13)
    with triton_checker.watch(x) as traffic:
        add_neighbour[(4,)](x, y, 100)
    torch.testing.assert_close(y, x + torch.cat((x[1:], torch.zeros(1))))
    assert (traffic.loaded, traffic.loaded_sectors, traffic.moved) == (796, 3 * 5 + 1, 32 * (16 + 13))
    with triton_checker.watch(x) as traffic:
        total[(1,)](x, y, 20, defined=True)
    torch.testing.assert_close(y[0], x[:20].sum())


def test_what_a_program_loads_again_is_cached_within_limits() -> None:
    """In 16 KiB, from where what was loaded longest ago goes first; a store is a store each time."""
    for kilobytes, fetched in ((8, 8), (16, 16), (17, 34)):
        x, y = torch.randn(kilobytes * 256), torch.zeros(kilobytes * 256)
        with triton_checker.watch(x) as traffic:
            walk_twice[(1,)](x, y, len(x), block=256)
        assert traffic.loaded == traffic.stored == 32 * traffic.stored_sectors == 2 * 1024 * kilobytes
        assert 32 * traffic.loaded_sectors == 1024 * fetched
        with triton_checker.watch(x) as traffic:  # each program, and each launch, has a cache of its own
            walk_twice[(1,)](x, y, 256, block=256)
            walk_twice[(1,)](x, y, 256, block=256)
        assert 32 * traffic.loaded_sectors == 2 * 1024
    y = torch.zeros(32)
    with triton_checker.watch() as traffic:
        store_then_load[(1,)](y)
    assert (traffic.loaded_sectors, traffic.stored_sectors) == (4, 8)


def test_masked_lanes_of_a_view() -> None:
    x, y = torch.randn(128).bfloat16(), torch.zeros(64, dtype=torch.bfloat16)
    with triton_checker.watch(x[3:61]) as traffic:
        copy[(2,)](x[3:61], y, 58, masked=True)
    assert torch.equal(y[:58], x[3:61])
    assert traffic.loaded == traffic.stored == 116


def test_one_past_the_end() -> None:
    x, y = torch.randn(100), torch.zeros(128)
    fault = _fault(lambda: copy[(4,)](x, y, 100, masked=False))
    assert fault == "out of bounds: load of 28 of 32 lanes, first element 100 of a tensor of 100 elements (program 3)"
    x, y = torch.randn(128), torch.zeros(127)
    assert "out of bounds: store of 1 of 32 lanes" in _fault(lambda: copy[(4,)](x, y, 127, masked=False))


def test_before_the_start() -> None:
    x, y = torch.randn(64), torch.zeros(64)
    fault = _fault(lambda: shifted[(2,)](x[32:], y, -1))
    assert fault == "out of bounds: load of 1 of 32 lanes, first element -1 of a tensor of 32 elements (program 0)"


def test_past_a_view_inside_its_storage() -> None:
    x, y = torch.randn(128), torch.zeros(64)
    assert "load of 4 of 32 lanes" in _fault(lambda: copy[(2,)](x[:60], y, 64, masked=False))


def test_between_the_elements_of_a_view() -> None:
    x, y = torch.randn(64)[::2], torch.zeros(32)
    fault = _fault(lambda: copy[(1,)](x, y, 32, masked=False))
    assert "load of 16 of 32 lanes, first between the elements of a view" in fault


def test_the_view_that_is_watched_counts() -> None:
    storage, y = torch.randn(128), torch.zeros(64)
    assert "out of bounds: load" in _fault(lambda: copy[(2,)](storage, y, 64, masked=False), storage[:60])


def test_store_to_an_input() -> None:
    x, y = torch.randn(64), torch.zeros(64)
    assert "store to an input" in _fault(lambda: copy[(2,)](x, y, 64, masked=False), x, y)


def test_two_programs_write_one_address() -> None:
    fault = _fault(lambda: overlap[(3,)](torch.zeros(99), 99))
    assert "race: store at 1 addresses that another program stores" in fault


def test_one_program_reads_what_another_writes() -> None:
    x = torch.randn(96)
    assert "race: store at 1 addresses that another program loads" in _fault(lambda: add_neighbour[(3,)](x, x, 96))


def test_atomic_and_plain_access() -> None:
    x, y = torch.zeros(1), torch.zeros(4)
    assert "race: update at 1 addresses that another program stores" in _fault(lambda: store_and_update[(2,)](x))
    assert "race: update at 1 addresses that another program loads" in _fault(lambda: load_and_update[(2,)](x, y))


def test_two_lanes_write_one_address() -> None:
    assert "two lanes of one store" in _fault(lambda: pairs_to_one_address[(1,)](torch.zeros(32)))


def test_masked_load_used_undefined() -> None:
    y = torch.zeros(1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = torch.ones(20, dtype=dtype)
        with triton_checker.watch(x):
            total[(1,)](x, y, 20, defined=False)
        assert y.isnan().all()


def test_launches_are_checked_without_a_watch() -> None:
    with pytest.raises(Exception, match="out of bounds: load"):
        copy[(4,)](torch.randn(100), torch.zeros(128), 100, masked=False)


# --- bf16 -------------------------------------------------------------------------------------------------------------


@triton.jit
def arithmetic(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + a)
    tl.store(out + n + i, tl.where(a > b, a, b) / 3)
    tl.store(out + 2 * n + i, tl.maximum(a, b) - tl.abs(a))
    tl.store(out + 3 * n + i, -a)


def test_bf16_arithmetic() -> None:
    x, y = torch.randn(2, 1024).bfloat16()
    out = torch.empty(4, 1024, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, n=1024)
    expected = torch.stack((x * y + x, torch.maximum(x, y) / 3, torch.maximum(x, y) - x.abs(), -x))
    assert torch.equal(out, expected)


@triton.jit
def cast(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_to_bf16_round_to_nearest_even(source: torch.dtype) -> None:
    x = (torch.randn(4096, dtype=torch.float64) * 1000).to(source)
    if source.is_floating_point:
        x[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e-8], dtype=torch.float64).to(source)
    y = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](x, y, n=4096)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_from_bf16(target: torch.dtype) -> None:
    x, y = (torch.randn(4096) * 1000).bfloat16(), torch.empty(4096, dtype=target)
    cast[(1,)](x, y, n=4096)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0)


@triton.jit
def reductions(x, y):
    v = tl.load(x + tl.arange(0, 256))
    tl.store(y, tl.sum(v, 0))
    tl.store(y + 1, tl.max(v, 0))
    tl.store(y + 2, tl.sum(v.to(tl.float32), 0).to(tl.bfloat16))
    tl.store(y + 3 + tl.arange(0, 256), tl.cumsum(v, 0))


def test_bf16_reductions() -> None:
    x, y = torch.randn(256).bfloat16(), torch.empty(259, dtype=torch.bfloat16)
    reductions[(1,)](x, y)
    exact = x.double()
    expected = torch.stack((exact.sum(), exact.max(), exact.sum()))
    torch.testing.assert_close(y[:3].double(), expected, rtol=4e-3, atol=1e-3)
    torch.testing.assert_close(y[3:].double(), exact.cumsum(0), rtol=4e-3, atol=1e-3)


@triton.jit
def product(a, b, c):
    i, k = tl.arange(0, 32), tl.arange(0, 64)
    tl.store(c + i[:, None] * 32 + i, tl.dot(tl.load(a + i[:, None] * 64 + k), tl.load(b + k[:, None] * 32 + i)))


def test_bf16_matrix_product() -> None:
    a, b, c = torch.randn(32, 64).bfloat16(), torch.randn(64, 32).bfloat16(), torch.empty(32, 32)
    product[(1,)](a, b, c)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
