"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import compare, run, tables
from bench.cases import MODES, PEER_KINDS, PRESETS, plan
from bench.html import html
from bench.results import Results
from convblocks import backends
from convblocks.opinfo import DTYPES, LAYOUTS, TIMED, Size

_DESCRIPTION = """Measures the operations against the best of torch eager and torch.compile, each in both memory
formats. A case is timed only if its results are as accurate as torch's; the exit status is 1 if one is not."""
_DTYPES = {str(d).removeprefix("torch."): d for d in DTYPES}
_REPORTS: dict[str, Callable[[Results], str]] = {".html": html, ".md": tables.markdown, ".csv": tables.as_csv}


def _bad(expected: str, got: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {got}")


def _names(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in allowed:
                raise _bad(f"one or more of {', '.join(allowed)} (with commas)", name or "an empty name")
        return names

    return parse


def _sizes(text: str) -> tuple[Size, ...]:
    expected = "sizes as N,C,H,W;N,C,H,W of positive integers"
    sizes = []
    for part in text.split(";"):
        try:
            n, c, h, w = (int(v) for v in part.split(","))
        except ValueError:
            raise _bad(expected, part or "an empty size") from None
        if min(n, c, h, w) < 1:
            raise _bad(expected, part)
        sizes.append((n, c, h, w))
    return tuple(sizes)


def _device(text: str) -> torch.device:
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if text in there or (text == "cuda" and len(there) > 1):
        return torch.device(text)
    hint = " (torch sees no CUDA device)" if len(there) == 1 else ""
    raise _bad(f"a device of {', '.join(there)}{hint}", text)


def _number(kind: type, least: float, expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            raise _bad(expected, text) from None
        if not value >= least:
            raise _bad(expected, text)
        return value

    return parse


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise _bad("a share as 5% or 0.05", text)
    return value


def _output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise _bad("a file in a folder that can be written to", text)
    return path


def _report(text: str) -> Path:
    path = _output(text)
    if path.suffix not in _REPORTS:
        raise _bad(f"a file that ends in {', '.join(_REPORTS)}", text)
    return path


def _results(text: str) -> Results:
    try:
        return Results.load(Path(text))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | compare | report")
    r = commands.add_parser("run", help="measure the operations against torch")
    r.add_argument("--ops", type=_names(*TIMED), default=tuple(TIMED), help=f"of {', '.join(TIMED)}; all by default")
    r.add_argument("--preset", choices=PRESETS, default="quick", help="sizes, dtypes and time per case (quick)")
    r.add_argument("--sizes", type=_sizes, help="N,C,H,W;N,C,H,W instead of the preset's")
    r.add_argument("--dtype", type=_names(*_DTYPES), help=f"of {', '.join(_DTYPES)}, instead of the preset's")
    r.add_argument("--layout", type=_names(*LAYOUTS), default=("contiguous", "channels_last"), help=", ".join(LAYOUTS))
    r.add_argument("--mode", type=_names(*MODES), default=MODES, help=", ".join(MODES))
    r.add_argument("--peers", type=_names(*PEER_KINDS), default=PEER_KINDS, help=", ".join(PEER_KINDS))
    r.add_argument("--device", type=_device, help="cpu, cuda, cuda:0, ...; a GPU if there is one by default")
    r.add_argument("--backend", choices=backends.BACKENDS, default=backends.selected, help="that runs ours")
    r.add_argument("--threads", type=_number(int, 1, "an integer of at least 1"), help="of torch on the CPU")
    r.add_argument("--seconds", type=_number(float, 0, "seconds, 0 or more"), help="of timing per case")
    r.add_argument("--seed", type=_number(int, 0, "an integer of at least 0"), default=0)
    r.add_argument("--output", type=_output, help="the JSON file to write, after every case")
    r.add_argument("--quiet", action="store_true", help="print only the summary")
    c = commands.add_parser("compare", help="compare two runs")
    c.add_argument("a", type=_results)
    c.add_argument("b", type=_results)
    c.add_argument("--fail-over", type=_share, metavar="5%", help="exit with 1 if a case became slower by more")
    p = commands.add_parser("report", help="write a run as HTML, Markdown or CSV")
    p.add_argument("results", type=_results)
    p.add_argument("-o", "--output", type=_report, required=True, help=f"ends in {', '.join(_REPORTS)}")
    return parser


def _run(args: argparse.Namespace, error: Callable[[str], object]) -> int:
    preset = PRESETS[args.preset]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [_DTYPES[name] for name in args.dtype] if args.dtype else preset.dtypes
    sizes = preset.sizes_of if args.sizes is None else lambda info, options: args.sizes
    cases = plan(args.ops, sizes, dtypes, args.mode, args.layout, device)
    seconds = preset.seconds if args.seconds is None else args.seconds
    with backends.use_backend(args.backend):
        for op in args.ops:
            reason = backends.why_not(TIMED[op].dispatched, args.backend, torch.empty(1, 1, 1, 1, device=device))
            if reason:
                error(f"argument --backend: expected one that runs {op} on {device}, got {args.backend}: {reason}")
        return run.run(cases, peers=args.peers, seconds=seconds, seed=args.seed, output=args.output, quiet=args.quiet)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "run":
        return _run(args, parser.error)
    if args.command == "compare":
        try:
            return compare.compare(args.a, args.b, args.fail_over)
        except ValueError as e:
            parser.error(str(e))
    args.output.write_text(_REPORTS[args.output.suffix](args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
