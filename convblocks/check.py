"""``python -m convblocks check``: every operation on every backend that runs here, in a few seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convblocks import backends
from convblocks.accuracy import Judge, run
from convblocks.opinfo import OPS, OpInfo, Sample
from convblocks.tables import Table

LAYOUTS = ("contiguous", "channels_last")


@dataclass
class Result:
    """One operation on one backend and device."""

    op: str
    backend: str
    device: str
    reason: str | None = None  # why it cannot run
    worst: float = 0.0  # the largest error, as a share of what is allowed
    seconds: float = 0.0
    cases: int = 0
    mismatches: list[str] = field(default_factory=list)


@dataclass
class Case:
    words: str
    sample: Sample
    grad: Tensor
    judge: Judge


def cases(info: OpInfo, device: str) -> Iterator[Case]:
    """Each option in each dtype and layout, each time at another size."""
    for i, (options, dtype, layout) in enumerate(itertools.product(info.options, info.dtypes, LAYOUTS)):
        size = info.sizes[(i + i // len(info.sizes)) % len(info.sizes)]
        sample = info.sample(size, options, dtype=dtype, layout=layout, device=device)
        grad = info.gradient(sample)
        words = f"{options} {str(dtype).removeprefix('torch.')} {layout} {'x'.join(map(str, size))}"
        yield Case(words, sample, grad, Judge(info, sample, grad))


def check(info: OpInfo, backend: str, device: str, cases: Sequence[Case]) -> Result:
    result = Result(info.name, backend, device, cases=len(cases))
    start = time.perf_counter()
    with backends.use_backend(backend):
        for case in cases:
            try:
                verdicts = case.judge.verdicts(run(info.op, case.sample, case.grad))
            except RuntimeError as e:
                result.mismatches.append(f"{case.words}: {str(e).splitlines()[0]}")
                continue
            result.worst = max(result.worst, *(v.share for v in verdicts))
            result.mismatches += [f"{case.words}: {v}" for v in verdicts if not v.right]
    result.seconds = time.perf_counter() - start
    return result


def results(info: OpInfo) -> Iterator[Result]:
    """Of every backend: on each device where it runs, or the reason why it runs on none."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    prepared = {device: list(cases(info, device)) for device in devices}
    for backend in backends.BACKENDS[1:]:
        reasons = {d: backends.why_not(info.name, backend, torch.empty(1, 1, 1, 1, device=d)) for d in devices}
        if None not in reasons.values():
            yield Result(info.name, backend, "-", backends.why_not(info.name, backend) or reasons[devices[-1]])
        for device in devices:
            if reasons[device] is None:
                yield check(info, backend, device, prepared[device])


def main() -> int:
    """Prints the table; 1 if a result is wrong."""
    found = [result for info in OPS.values() for result in results(info)]
    table = Table("Self-test: forward and gradients against float64", ["operation", "backend", "device", "result"])
    for r in found:
        words = f"not run: {r.reason}"
        if r.reason is None:
            verdict = f"{len(r.mismatches)} MISMATCHES" if r.mismatches else "ok"
            words = f"{verdict}, {r.cases} cases, worst error {r.worst:.0%} of what is allowed, {r.seconds:.1f} s"
        table.add(r.op, r.backend, r.device, words, bad=bool(r.mismatches))
    table.print()
    for r in found:
        for line in r.mismatches[:5]:
            print(f"{r.op} on {r.backend} ({r.device}): {line}")
    return int(any(r.mismatches for r in found))
