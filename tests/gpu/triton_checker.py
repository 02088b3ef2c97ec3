"""A checker over Triton's interpreter (TRITON_INTERPRET=1), for what the interpreter itself lets pass.

``install()``, once and before kernels run, makes every launch raise at

- an access outside the elements of the tensors that the kernel was given (a view's own elements, not its storage)
- a race: an address that one program stores or updates and another one loads, stores or updates (programs run one after
  another here, so a race would never show in a result)
- two lanes of one store that write one address

and makes masked-off lanes of a load without ``other`` NaN (the largest integer), where the interpreter gives zeros and
a GPU anything. bf16 is computed as on a GPU (triton_bf16.py).

``watch(*inputs)`` also forbids stores to the inputs and counts the bytes moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests.gpu import triton_bf16
from tests.gpu.traffic import CACHED_SECTORS, SECTOR, Traffic, elements, extent

NOBODY, MANY = -1, -2


class Fault(AssertionError):
    """What a kernel did wrong."""


class _Launch:
    """What a launch may touch, and which program has touched it: by granule, with one index over all tensors."""

    def __init__(self, tensors: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        watched: dict[int, list[Tensor]] = {}
        for t in inputs:
            watched.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        views = [v for t in tensors for v in watched.get(t.untyped_storage().data_ptr(), [t]) if v.numel()]
        views = sorted({(v.data_ptr(), v.shape, v.stride(), v.dtype): v for v in views}.values(), key=Tensor.data_ptr)
        self.granule = min((v.element_size() for v in views), default=1)
        starts: list[int] = []
        ends: list[int] = []
        for v in views:
            end = v.data_ptr() + len(elements(v))
            if ends and v.data_ptr() < ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(v.data_ptr())
                ends.append(end)
        self.starts, self.ends = np.array(starts, np.int64), np.array(ends, np.int64)
        sizes = (self.ends - self.starts) // self.granule
        self.first = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))  # flat index of each start
        count = int(self.first[-1])
        self.legal, self.read_only = np.zeros(count, bool), np.zeros(count, bool)
        for v in views:
            i = np.searchsorted(self.starts, v.data_ptr(), side="right") - 1
            begin = self.first[i] + (v.data_ptr() - self.starts[i]) // self.granule
            mask = elements(v).numpy()[:: self.granule]
            self.legal[begin : begin + len(mask)] |= mask
            if v.untyped_storage().data_ptr() in watched:
                self.read_only[begin : begin + len(mask)] |= mask
        self.loaded_by, self.stored_by, self.updated_by = (np.full(count, NOBODY, np.int32) for _ in range(3))
        self.cache, self.cache_of = dict[int, None](), NOBODY  # sectors, the one that was loaded last at the end

    def index(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        """The granules of each accessed element, all inside the tensors."""
        tensor = np.searchsorted(self.starts, address, side="right") - 1
        inside = (tensor >= 0) & (address + size <= self.ends[tensor])
        granules = (self.first[tensor] + (address - self.starts[tensor]) // self.granule)[:, None]
        granules = granules + np.arange(size // self.granule)
        legal = inside.copy()
        legal[inside] = self.legal[granules[inside]].all(1)
        if not legal.all():
            self._out_of_bounds(address[~legal], inside[~legal], len(address), size, what)
        return granules.ravel()

    def _out_of_bounds(self, bad: np.ndarray, inside: np.ndarray, lanes: int, size: int, what: str) -> None:
        place = "between the elements of a view"
        if not inside[0]:
            distance = np.minimum(abs(self.starts - bad[0]), abs(self.ends - bad[0]))
            nearest = int(distance.argmin())
            element = (bad[0] - self.starts[nearest]) // size
            place = f"element {element} of a tensor of {(self.ends[nearest] - self.starts[nearest]) // size} elements"
        _fail(f"out of bounds: {what} of {len(bad)} of {lanes} lanes, first {place}")

    def access(self, address: np.ndarray, size: int, what: str) -> None:
        at = self.index(address, size, what)
        me = _program()

        def race(owner: np.ndarray, other: str) -> None:
            others = (owner[at] != NOBODY) & (owner[at] != me)
            if others.any():
                first = owner[at][others][0]
                program = "several programs" if first == MANY else f"program {first}"
                _fail(f"race: {what} at {int(others.sum())} addresses that another program {other}, first: {program}")

        race(self.stored_by, "stores")
        if what != "update":
            race(self.updated_by, "updates")
        if what != "load":
            if self.read_only[at].any():
                _fail(f"{what} to an input")
            race(self.loaded_by, "loads")
        if what == "load":
            owner = self.loaded_by[at]
            self.loaded_by[at] = np.where((owner == NOBODY) | (owner == me), me, MANY)
        elif what == "update":
            self.updated_by[at] = me
        else:
            if len(np.unique(at)) < len(at):
                _fail("race: two lanes of one store write one address")
            self.stored_by[at] = me

    def fetched(self, sectors: list[int]) -> int:
        """How many of these a load fetches: the others are in the cache of its program."""
        if self.cache_of != (me := _program()):
            self.cache_of = me
            self.cache.clear()
        misses = 0
        for sector in sectors:
            if sector in self.cache:
                del self.cache[sector]
            else:
                misses += 1
            self.cache[sector] = None
            if len(self.cache) > CACHED_SECTORS:
                del self.cache[next(iter(self.cache))]
        return misses


_launch: _Launch | None = None
_inputs: tuple[Tensor, ...] = ()
_traffic: Traffic | None = None
_faults: list[str] = []


def _program() -> int:
    builder = interpreter.interpreter_builder
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    return int((x * ny + y) * nz + z)


def _fail(text: str) -> None:
    fault = f"{text} (program {_program()})"
    _faults.append(fault)
    raise Fault(fault)


def _check(pointer: TensorHandle, mask: TensorHandle | np.ndarray | None, what: str) -> None:
    if _launch is None:
        return
    lanes = True if mask is None else mask if isinstance(mask, np.ndarray) else mask.data
    addresses, active = np.broadcast_arrays(pointer.data, lanes)
    addresses = addresses[active.astype(bool)].astype(np.int64)  # a mask made of scalars may be of integers
    size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
    if not addresses.size:
        return
    _launch.access(addresses, size, what)
    if _traffic is not None:
        sectors = np.unique(np.concatenate((addresses // SECTOR, (addresses + size - 1) // SECTOR)))
        if what != "store":
            _traffic.loaded += addresses.size * size
            _traffic.loaded_sectors += _launch.fetched(sectors.tolist()) if what == "load" else len(sectors)
        if what != "load":
            _traffic.stored += addresses.size * size
            _traffic.stored_sectors += len(sectors)


def _undefined(pointer: TensorHandle) -> TensorHandle:
    """What stands in lanes that a load does not load."""
    kind = pointer.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    if kind == tl.bfloat16:
        value: Any = 0x7FC0
    elif kind.is_floating():
        value = np.nan
    else:
        value = True if dtype == np.bool_ else np.iinfo(dtype).max
    return TensorHandle(np.full(np.shape(pointer.data), value, dtype), kind)


def _views(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for a in arguments:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (tuple, list)):
            yield from _views(a)
        elif hasattr(a, "base"):  # a tensor descriptor, or a tensor of another type
            yield from _views([a.base])


def install() -> None:
    """Puts the checker into this process. Calling it again changes nothing."""
    builder: Any = InterpreterBuilder
    if builder.create_masked_load.__module__ == __name__:
        return
    triton_bf16.install()
    # Its checks of integer overflow cost half of the time and never fire: they are for debug mode.
    options = interpreter.InterpreterOptions()
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    load, store = builder.create_masked_load, builder.create_masked_store
    update, exchange, launch = builder.create_atomic_rmw, builder.create_atomic_cas, GridExecutor.__call__
    patch_language = interpreter._patch_lang
    patched: set[frozenset[int]] = set()

    def checked_load(self: Any, pointer: TensorHandle, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        _check(pointer, mask, "load")
        if other is None and pointer.data.size > 1:  # of a single lane triton drops `other` when it is zero
            other = _undefined(pointer)
        return load(self, pointer, mask, other, *rest, **options)

    def checked_store(self: Any, pointer: TensorHandle, value: Any, mask: Any, *rest: Any) -> Any:
        _check(pointer, mask, "store")
        return store(self, pointer, value, mask, *rest)

    def checked_update(self: Any, op: Any, pointer: TensorHandle, value: Any, mask: Any, *rest: Any) -> Any:
        _check(pointer, mask, "update")
        return update(self, op, pointer, value, mask, *rest)

    def checked_exchange(self: Any, pointer: TensorHandle, *rest: Any) -> Any:
        _check(pointer, None, "update")
        return exchange(self, pointer, *rest)

    def patch_language_once(function: Any) -> Any:
        """The interpreter does it again in each call of a device function, which takes half of its time."""
        modules = frozenset(id(m) for m in function.__globals__.values() if m is tl or m is tl.core)
        if modules in patched:
            return None
        patched.add(modules)
        return patch_language(function)

    def checked_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        patched.clear()
        views = list(_views((*args, *kwargs.values())))
        if max(map(extent, views), default=0) < 2**28:  # a view spread over gigabytes has no room for the marks
            _launch = _Launch(views, _inputs)
        try:
            with np.errstate(all="ignore"):  # 0 / 0 is NaN on a GPU, and no news
                launch(self, *args, **kwargs)
        finally:
            _launch = None

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = checked_update, checked_exchange
    GridExecutor.__call__, interpreter._patch_lang = checked_launch, patch_language_once


@contextlib.contextmanager
def watch(*inputs: Tensor) -> Iterator[Traffic]:
    """Inside, kernels may load exactly the elements of the inputs and not store to them; counts what they move. Raises
    AssertionError with the first fault."""
    global _inputs, _traffic
    _inputs, _traffic = inputs, Traffic()
    _faults.clear()
    try:
        yield _traffic
    except Exception as e:
        if _faults:  # the interpreter wraps it
            raise Fault(_faults[0]) from e
        raise
    finally:
        _inputs, _traffic = (), None
