"""The loop over the cases: measures, shows, keeps what is done, and tells by its exit status whether all was right."""

from __future__ import annotations

from pathlib import Path

import torch

from bench import machine, tables
from bench.cases import Case
from bench.measure import measure
from bench.progress import progress
from bench.results import Results
from bench.timing import Clock, CpuClock, CudaClock

FAILED, INTERRUPTED = 1, 130


def run(
    cases: list[Case], *, peers: tuple[str, ...], seconds: float, seed: int, output: Path | None, quiet: bool
) -> int:
    device = cases[0].device
    clock: Clock = CpuClock()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # the peers get the fastest algorithm that cuDNN has
        clock = CudaClock(device)
    results = Results(machine.header(device, seed, sum(len(c.layouts) for c in cases)), [])
    load, cores = results.header["load_average"], results.header["cores"]
    if device.type == "cpu" and load and load > cores / 2:
        print(f"the machine is busy (load average {load:.1f} on {cores} cores): expect noise")
    status = 0
    try:
        with progress(len(cases), quiet) as shown:
            for case in cases:
                rows = measure(case, clock, peers=peers, seconds=seconds, seed=seed)
                results.rows += rows
                if output is not None:
                    results.save(output)
                shown.done(case, rows)
    except KeyboardInterrupt:
        status = INTERRUPTED
        if output is not None and results.rows:
            results.save(output)
        kept = f", kept in {output}" if output is not None and results.rows else ""
        print(f"\nstopped after {len(results.rows)} of {results.header['planned_rows']} rows{kept}")
    if not quiet:
        for group in results.groups():
            print()
            tables.show(tables.case_table(group))
    if results.rows:
        print()
        tables.show(tables.summary_table(results))
        print(tables.machine(results.header))
    unsettled = sum(r.ratio is not None and not r.settled for r in results.rows)
    if unsettled:
        print(f"{unsettled} of {len(results.rows)} speed-ups did not settle (marked ?): the machine was too busy")
    failed = [r for r in results.rows if not r.verified]
    for r in failed:
        print(f"parity failed: {tables.title(r)}, {tables.size(r)}, {r.layout}: {r.problem}")
    for name, error in sorted({(n, e) for r in results.rows for n, e in r.peer_errors.items()}):
        print(f"peer {name} did not run: {error}")
    return status or (FAILED if failed else 0)
