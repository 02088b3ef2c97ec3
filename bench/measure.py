"""Measures one case: parity of ours first, then ours, the peers and a copy in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cases import PEER_LAYOUTS, Case, call, convert, peer
from bench.results import Row
from bench.timing import Call, Clock, Timing, graphed, interleave
from convblocks import backends
from convblocks.accuracy import Judge
from convblocks.opinfo import Sample


class Mismatch(Exception):
    """A result is further from the exact one than it may be."""


def measure(case: Case, clock: Clock, *, peers: tuple[str, ...], seconds: float, seed: int) -> list[Row]:
    backward = case.mode != "fwd"
    with torch.set_grad_enabled(backward):
        samples = {layout: case.sample(layout, seed) for layout in case.layouts}
        ours = _ours(case, samples, seed)
        others = _peers(case, peers, seed)
        plain = torch.cat(convert(samples[case.layouts[0]], "contiguous").maps, 1).detach()
        target = torch.empty_like(plain)
        running = {name: run for name, run in (*ours.items(), *others.items()) if not isinstance(run, str)}
        timings = interleave({**running, "copy": lambda: target.copy_(plain)}, clock, seconds, seed)
        graphs: dict[str, Timing] = {}
        if case.device.type == "cuda":
            replays = {name: _attempt(partial(graphed, run)) for name, run in running.items()}
            graphs = interleave({n: r for n, r in replays.items() if not isinstance(r, str)}, clock, seconds, seed)

    def row(layout: str, sample: Sample) -> Row:
        mine = ours[layout]
        passes = (False, True) if backward else (False,)
        return Row(
            op=case.op,
            options=case.options,
            size=case.size,
            dtype=str(case.dtype).removeprefix("torch."),
            layout=layout,
            mode=case.mode,
            device=case.device.type,
            backend=backends.which(case.info.dispatched, sample.x),
            threads=torch.get_num_threads(),
            least_bytes=sum(case.info.least_bytes(sample, p) for p in passes),
            flops=sum(case.info.flops(sample, p) for p in passes),
            problem=mine if isinstance(mine, str) else None,
            ours=timings.get(layout),
            peers={name: timings[name] for name in others if name in timings},
            peer_errors={name: error for name, error in others.items() if isinstance(error, str)},
            copy=timings["copy"],
            copy_bytes=2 * plain.numel() * plain.element_size(),
            graph={"ours" if n == layout else n: t for n, t in graphs.items() if n == layout or n in others},
        )

    return [row(layout, sample) for layout, sample in samples.items()]


def _attempt(prepare: Callable[[], Call]) -> Call | str:
    """The call, or the error that it raised, whatever it was: its row says so and the run goes on."""
    try:
        return prepare()
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]


def _ours(case: Case, samples: dict[str, Sample], seed: int) -> dict[str, Call | str]:
    """Ours in each layout, or why it may not be timed."""

    def verified(sample: Sample) -> Call:
        run = call(case.info.op, sample, case, seed)
        wrong = judge.complaints([t.detach() for t in run()])
        if wrong:
            raise Mismatch("; ".join(wrong))
        return run

    calls: dict[str, Call | str] = {}
    checked: Tensor | None = None
    for layout, sample in samples.items():
        if checked is None or not torch.equal(checked, sample.x):  # most layouts hold the same values
            judge = Judge(case.info, sample, case.grad(sample, seed) if case.mode != "fwd" else None)
            checked = sample.x
        calls[layout] = _attempt(partial(verified, sample))
    return calls


def _peers(case: Case, kinds: tuple[str, ...], seed: int) -> dict[str, Call | str]:
    """The peers, compiled and warm, or why one does not run; the compiler of a machine may be missing or broken."""
    torch.compiler.reset()  # else the reference is compiled for every size until torch gives up and runs it eagerly

    def warm(kind: str, layout: str) -> Call:
        run = call(peer(kind, case.info.reference), convert(sample, layout), case, seed)
        run()
        return run

    sample = case.sample("contiguous", seed)
    return {f"{kind}/{to}": _attempt(partial(warm, kind, to)) for kind in kinds for to in PEER_LAYOUTS}
