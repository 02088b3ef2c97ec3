"""Timing that survives a noisy machine: everything that is compared is sampled in turn, in a new order every round."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


NEAR, ENOUGH, PATIENCE = 1.05, 3, 3.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call over n samples; q1 and q3 are the quartiles, near of the samples are within 5 % of the least."""

    min: float
    q1: float
    median: float
    q3: float
    n: int
    near: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(min(samples), q1, median, q3, len(samples), _near(samples))

    @property
    def settled(self) -> bool:
        """The least time was reached more than once: it is the cost of the call and not a lucky moment."""
        return self.near >= ENOUGH


def _settled(samples: dict[str, list[float]]) -> bool:
    return all(_near(s) >= ENOUGH for s in samples.values())


def _near(samples: list[float]) -> int:
    limit = min(samples) * NEAR
    return sum(s <= limit for s in samples)


class Clock(Protocol):
    shortest: float  # seconds that one sample has to last; short calls are repeated for it

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds per call."""


class CpuClock:
    shortest = 2e-3
    long = 2e-2  # seconds of a call to which it does not matter what another left in the caches

    def sample(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        call()  # so that the next ones find the caches as it left them
        first = time.perf_counter() - start
        if repeats == 1 and first > self.long:
            return first
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """Events around one call, with the L2 cache flushed before it, outside the events."""

    shortest = 0.0

    def __init__(self, device: torch.device) -> None:
        l2: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 2**28), dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, call: Call, repeats: int) -> float:
        self._flush.zero_()
        self._start.record()
        for _ in range(repeats):
            call()
        self._end.record()
        torch.cuda.synchronize()
        milliseconds: float = self._start.elapsed_time(self._end)
        return milliseconds / 1e3 / repeats


def graphed(call: Call) -> Call:
    """The call as the replay of a CUDA graph: the time of its kernels without that of launching them from Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleave(
    calls: dict[str, Call], clock: Clock, seconds: float, seed: int = 0, fewest: int = 7, most: int = 1000
) -> dict[str, Timing]:
    """Samples every call once per round, for about ``seconds`` in all and at least ``fewest`` rounds.

    On a busy machine, up to PATIENCE times longer, until the shortest time of every call has been reached repeatedly.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        repeats[name] = 1
        while clock.sample(call, repeats[name]) * repeats[name] < clock.shortest:
            repeats[name] *= 2
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    with _no_garbage_collection():
        start = time.perf_counter()
        for done in range(most):
            elapsed = time.perf_counter() - start
            if done >= fewest and elapsed > seconds and (elapsed > PATIENCE * seconds or _settled(samples)):
                break
            shuffle(order)
            for name in order:
                samples[name].append(clock.sample(calls[name], repeats[name]))
    return {name: Timing.of(values) for name, values in samples.items()}
