"""Accelerates seven public networks in place, shows that they still compute the same, and in what time.

Run as python -m bench.demo; on a GPU if there is one. Weights and statistics are random, nothing is downloaded. The
exit status is 1 if a network does not agree with the untouched one, and 2 if a library is missing.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import convblocks
from bench.timing import Clock, CpuClock, CudaClock, Timing, interleave
from convblocks import backends
from convblocks.accelerate import Report

try:
    import timm
    import torchvision
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as e:
    print(f"demo: expected timm, torchvision and rich, got: {e} (pip install timm torchvision rich)", file=sys.stderr)
    sys.exit(2)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm seresnet50": lambda: timm.create_model("seresnet50"),
    "timm ecaresnet26t": lambda: timm.create_model("ecaresnet26t"),
    "torchvision efficientnet_b0": lambda: torchvision.models.efficientnet_b0(stochastic_depth_prob=0.0, dropout=0.0),
    "torchvision mobilenet_v3_large": lambda: torchvision.models.mobilenet_v3_large(dropout=0.0),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(dropout=0.0),
    "torchvision shufflenet_v2_x1_0": lambda: torchvision.models.shufflenet_v2_x1_0(),
    "timm fasternet_t0": lambda: timm.create_model("fasternet_t0"),
}
COMPARED, TIMED = (2, 3, 64, 64), 224  # images whose results are compared; side of those that are timed
SECONDS = 2.0  # for each row of times
MODELS = ("untouched", "accelerated", "folded")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

Results = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """Relative errors of all values together, and what the second may be."""

    what: str
    untouched: float
    accelerated: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.accelerated <= self.allowed


@dataclass(frozen=True)
class Outcome:
    network: str
    report: Report
    comparisons: list[Comparison]
    times: dict[tuple[int, str], dict[str, Timing]]  # batch and layout, then one of MODELS

    @property
    def agrees(self) -> bool:
        return bool(self.report.replaced) and all(c.agrees for c in self.comparisons)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with random batch-norm statistics: as timm makes them, a zero hides most blocks."""
    torch.manual_seed(0)
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            statistics = m.state_dict()
            for name in ("weight", "running_var"):
                nn.init.uniform_(statistics[name], 0.5, 1.5)
            for name in ("bias", "running_mean"):
                nn.init.normal_(statistics[name], 0.0, 0.2)
    return model


def _results(model: nn.Module, x: Tensor, train: bool) -> Results:
    """The output and the gradients of the input and all weights, on a copy."""
    model = copy.deepcopy(model).to(x.dtype).train(train)
    x = x.clone().requires_grad_()
    y = model(x)
    grad = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    return {"output": [y.detach()], "gradients": list(torch.autograd.grad(y, [x, *model.parameters()], grad))}


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    missed = [(a.double() - b).norm() for a, b in zip(results, exact, strict=True)]
    return float(torch.stack(missed).norm() / torch.stack([b.norm() for b in exact]).norm())


def compare(untouched: nn.Module, accelerated: nn.Module, folded: nn.Module, device: torch.device) -> list[Comparison]:
    """The networks against the untouched one in float64.

    In float32 the accelerated one may be off by twice what the untouched one is off by, and a little. For gradients
    that little is a percent: a ReLU whose input is rounded across zero has another gradient, in either network. That
    does not happen in float64, where a whole training step has to agree.
    """
    x = torch.randn(*COMPARED, generator=torch.Generator().manual_seed(1)).to(device)
    comparisons = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = _results(untouched, x.double(), train=False)
        before, after = _results(untouched, x, train=False), _results(accelerated, x, train=False)
        for what, little in (("output", 1e-6), ("gradients", 1e-2)):
            errors = _error(before[what], exact[what]), _error(after[what], exact[what])
            comparisons.append(Comparison(f"float32 {what}", *errors, allowed=2 * errors[0] + little))
        with torch.inference_mode():
            own = folded.eval()(x.to(memory_format=torch.channels_last))
        error = _error([own], exact["output"])
        allowed = 4 * comparisons[0].untouched + 1e-6  # as other factors are rounded
        comparisons.append(Comparison("float32 output, folded", comparisons[0].untouched, error, allowed))
        exact, after = (_results(m, x.double(), train=True) for m in (untouched, accelerated))
        for what in ("output", "gradients"):
            error = _error(after[what], exact[what])
            comparisons.append(Comparison(f"float64 training {what}", 0.0, error, allowed=1e-6))
    return comparisons


def measure(
    models: Mapping[str, nn.Module], batch: int, layout: str, device: torch.device, clock: Clock
) -> dict[str, Timing]:
    x = torch.randn(batch, 3, TIMED, TIMED, generator=torch.Generator().manual_seed(2))
    x = x.to(device, memory_format=LAYOUTS[layout])
    calls = {name: partial(model.to(memory_format=LAYOUTS[layout]), x) for name, model in models.items()}
    with torch.inference_mode():
        return interleave(calls, clock, SECONDS, fewest=4)


def _kinds(report: Report) -> str:
    """What was replaced by what, one line per kind."""
    kinds = Counter((e.source.rpartition(".")[2], e.operation, e.backend) for e in report.replaced)
    lines = [f"{n} {source} -> {operation} ({backend})" for (source, operation, backend), n in kinds.items()]
    lines += [f"{n} left: {reason}" for reason, n in Counter(e.reason for e in report.skipped).items()]
    return "\n".join(lines) or "nothing"


def _agreement(outcomes: list[Outcome]) -> Table:
    table = Table("network", "compared", title="Relative error against the untouched network in float64", box=SIMPLE)
    for column in ("untouched", "accelerated", "allowed"):
        table.add_column(column, justify="right")
    table.add_column("agrees")
    for outcome in outcomes:
        for i, c in enumerate(outcome.comparisons):
            numbers = (f"{v:.1e}" for v in (c.untouched, c.accelerated, c.allowed))
            verdict = "[green]yes" if c.agrees else "[red]NO"
            table.add_row("" if i else outcome.network, c.what, *numbers, verdict)
        table.add_section()
    return table


def _speed(outcomes: list[Outcome], where: str) -> Table:
    title = f"Milliseconds for a batch of {TIMED}x{TIMED} images, inference, {where}"
    table = Table("network", "replaced", title=title, box=SIMPLE)
    for column in ("batch", "layout", "before", "after", "speed-up", "folded", "speed-up"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        first = outcome.network, _kinds(outcome.report)
        for (batch, layout), times in outcome.times.items():
            before, *others = (times[k].min * 1e3 for k in MODELS)
            cells = [f"{before:.1f}"]
            for after in others:  # no speed-up for what does not agree
                cells += [f"{after:.1f}", f"{before / after:.2f}" if outcome.agrees else "-"]
            table.add_row(*first, str(batch), layout, *cells)
            first = "", ""
        table.add_section()
    return table


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock: Clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    batches = (1, 32) if device.type == "cuda" else (1, 8)
    threads = f"{torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}, {backends.cpu_isa}"
    if backends.extension_error is not None:
        console.print(f"[yellow]The compiled part is missing, plain torch runs instead: {backends.extension_error}")
    outcomes: list[Outcome] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(NETWORKS) * (1 + len(batches) * len(LAYOUTS)))
        for name, make in NETWORKS.items():
            progress.update(task, description=f"{name}: comparing")
            untouched = build(make).to(device)
            accelerated, folded = copy.deepcopy(untouched), copy.deepcopy(untouched)
            report = convblocks.accelerate(accelerated)
            convblocks.accelerate(folded, fold_bn=True)
            comparisons = compare(untouched, accelerated, folded, device)
            progress.advance(task)
            models = dict(zip(MODELS, (m.eval() for m in (untouched, accelerated, folded)), strict=True))
            times = {}
            for batch, layout in itertools.product(batches, LAYOUTS):
                progress.update(task, description=f"{name}: timing batch {batch}, {layout}")
                times[batch, layout] = measure(models, batch, layout, device, clock)
                progress.advance(task)
            outcomes.append(Outcome(name, report, comparisons, times))
            verdict = "[green]agrees" if outcomes[-1].agrees else "[red]DOES NOT AGREE"
            console.print(f"{name}: {len(report.replaced)} of {len(report.entries)} blocks replaced, {verdict}")
    console.print(_agreement(outcomes))
    console.print(
        "Error of all values together. Allowed in float32: twice that of the untouched network and 1e-6, for gradients "
        "1e-2 (a ReLU rounded across zero has another gradient in either network), with batch norms folded four times "
        "and 1e-6; in float64: 1e-6.\n"
    )
    console.print(_speed(outcomes, where))
    console.print("After: accelerate(model). Folded: accelerate(model, fold_bn=True). Run in turn; the least of many.")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores + 1:  # one is this process
        console.print(f"[yellow]The machine is busy (load {load:.1f} on {cores} cores): do not trust these times.")
    wrong = [o.network for o in outcomes if not o.agrees]
    if wrong:
        console.print(f"[red]These networks do not agree: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
