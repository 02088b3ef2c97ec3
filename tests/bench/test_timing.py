"""The sampling itself, with a clock made for the test; and the GPU's clock with events made for it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.timing import Call, CpuClock, CudaClock, Timing, interleave


class _Clock:
    """Says that a call lasts as long as the call says."""

    def __init__(self, shortest: float) -> None:
        self.shortest = shortest
        self.log: list[tuple[float, int]] = []

    def sample(self, call: Call, repeats: int) -> float:
        seconds: float = call()
        self.log.append((seconds, repeats))
        return seconds


def test_timing_of_samples() -> None:
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 1.04]) == Timing(1.0, 1.04, 2.0, 3.0, 5, 2)


def test_calls_are_sampled_in_turn_and_in_changing_order() -> None:
    clock = _Clock(shortest=0.0)
    timings = interleave({"a": lambda: 1.0, "b": lambda: 2.0, "c": lambda: 3.0}, clock, 0.0, fewest=20)
    assert {name: (t.min, t.n) for name, t in timings.items()} == {"a": (1.0, 20), "b": (2.0, 20), "c": (3.0, 20)}
    seconds = [s for s, _ in clock.log[3:]]  # the first three are the calibration
    rounds = [tuple(seconds[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == [1.0, 2.0, 3.0] for r in rounds)
    assert len(set(rounds)) > 3


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    clock = _Clock(shortest=1.0)
    interleave({"short": lambda: 0.15, "long": lambda: 3.0}, clock, 0.0, fewest=2)
    assert {(s, n) for s, n in clock.log[-4:]} == {(0.15, 8), (3.0, 1)}


def test_the_time_asked_for_is_kept() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    timing = interleave({"nothing": call}, CpuClock(), 0.05, most=10**6)["nothing"]
    assert 7 < timing.n < 10**6
    assert 0 < timing.min < 1e-5
    assert calls > timing.n


@pytest.mark.parametrize(("seconds", "repeats"), [(1e-4, 33), (5e-3, 2), (0.1, 1)])
def test_how_often_a_sample_calls(seconds: float, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls until the sample is long enough, and one before it that is not timed; long ones once."""
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        now += seconds
        calls += 1

    monkeypatch.setattr("bench.timing.time", SimpleNamespace(perf_counter=lambda: now))
    for fewest in (7, 8):
        before, calls = calls, 0
        timing = interleave({"call": call}, CpuClock(), 0, fewest=fewest)["call"]
        assert timing.n == fewest
        assert timing.min == pytest.approx(seconds)
    assert calls - before == repeats


def test_a_busy_machine_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample is much shorter than the rest: it is not believed before it was reached again."""
    now = 0

    class Clock(_Clock):
        def sample(self, call: Call, repeats: int) -> float:
            nonlocal now
            now += 1
            return next(values)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    values = iter([9.0, 1.0, *[2.0] * 100, 1.01, 1.02, *[2.0] * 1000])  # the first is the calibration
    timing = interleave({"call": lambda: None}, Clock(0.0), seconds=50)["call"]
    assert (timing.near, timing.settled, timing.n) == (3, True, 103)
    values = iter([9.0, 1.0, *[2.0] * 1000])
    timing = interleave({"call": lambda: None}, Clock(0.0), seconds=50)["call"]
    assert (timing.near, timing.settled, timing.n) == (1, False, 151)
    values = iter([2.0] * 1000)
    assert interleave({"call": lambda: None}, Clock(0.0), seconds=50)["call"].n == 51


def test_the_cache_is_flushed_outside_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Any) -> float:
            return 6.0  # milliseconds

    class Flush:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"L2_cache_size": 2**20}))
    sizes: list[int] = []

    def empty(size: int, **options: Any) -> Flush:
        sizes.append(size)
        return Flush()

    monkeypatch.setattr(torch, "empty", empty)
    clock = CudaClock(torch.device("cuda"))
    assert sizes == [2**28]
    assert clock.sample(lambda: log.append("call"), 3) == 0.002
    assert log == ["flush", "event", "call", "call", "call", "event", "synchronize"]
