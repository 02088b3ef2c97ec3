"""The tables of a run, made once and shown, or written as Markdown or CSV."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import fields

from bench.progress import speed_up
from bench.results import DERIVED, Results, Row, Summary
from convblocks.tables import Table


def duration(seconds: float) -> str:
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def options(row: Row) -> str:
    return ", ".join(f"{k}={v}" for k, v in row.options.items())


def size(row: Row) -> str:
    return "x".join(map(str, row.size))


def call(row: Row) -> str:
    return f"{row.op} ({options(row)})" if row.options else row.op


def title(row: Row) -> str:
    return f"{call(row)}, {row.mode}, {row.dtype}, {row.device}"


def case_table(summary: Summary) -> Table:
    graph = any(r.graph for r in summary.rows)
    columns = ["size", "layout", "backend", "ours", "best peer", "", "speed-up", "median", "spread"]
    columns += ["graph"] * graph + ["GB/s", "of copy", "n"]
    table = Table(title(summary.rows[0]), columns)
    for r in summary.rows:
        best = r.best_peer
        peer = [best, duration(r.peers[best].min)] if best else ["-", "-"]
        if r.ours is None:
            cells = [size(r), r.layout, r.backend, "-", *peer, speed_up(r)]
            cells += ["-"] * (len(columns) - len(cells))
        else:
            ratio = number(r.ratio) + (" ?" if r.ratio and not r.settled else "")
            cells = [size(r), r.layout, r.backend, duration(r.ours.min), *peer, ratio, number(r.median_ratio)]
            cells += [f"{(r.ours.q3 - r.ours.q1) / r.ours.median:.0%}", *[number(r.graph_ratio)] * graph]
            cells += [number(r.gbps, ".1f"), number(r.copy_share, ".0%"), str(r.ours.n)]
        table.add(*cells, bad=r.ratio is None or r.ratio < 1)
    return table


def summary_table(results: Results) -> Table:
    columns = ["operation", "mode", "dtype", "cases", "speed-up", "contiguous", "channels_last", "worst", "at"]
    table = Table("Speed-up over the best peer, geometric means", columns)
    for s in results.groups():
        first, worst = s.rows[0], s.worst
        failed = sum(not r.verified for r in s.rows)
        unsettled = sum(not r.settled for r in s.timed)
        cases = f"{len(s.rows)}" + f" ({failed} failed)" * (failed > 0) + f" ({unsettled} ?)" * (unsettled > 0)
        means = [number(s.mean(layout)) for layout in (None, "contiguous", "channels_last")]
        least = [number(worst.ratio), f"{size(worst)} {worst.layout}"] if worst else ["-", "-"]
        slow = bool(failed) or worst is None or (s.mean() or 0.0) < 1
        table.add(call(first), first.mode, first.dtype, cases, *means, *least, bad=slow)
    return table


def show(table: Table) -> None:
    """In colour on a terminal that is wide enough for its boxes; nothing is cut."""
    width = max(map(len, str(table).splitlines())) + len(table.columns) + 1
    if width > shutil.get_terminal_size().columns:
        print(f"{table}\n")
    else:
        table.print()


def machine(header: dict[str, object]) -> str:
    known = {
        name: header.get(name) or "unknown" for name in ("cpu", "threads", "isa_torch", "torch", "convblocks", "date")
    }
    known["git"] = f" ({str(header['git'])[:8]})" if header.get("git") else ""
    gpu = f"{header['gpu']} (CUDA {header.get('cuda')}), " if header.get("gpu") else ""
    where = "{cpu}, {threads} threads, {isa_torch}; torch {torch}, convblocks {convblocks}{git}, {date}"
    return gpu + where.format_map(known)


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def markdown(results: Results) -> str:
    """For a README: the summary first, then every case, losses included."""
    parts = [f"Measured on {machine(results.header)}.", _markdown(summary_table(results))]
    for s in results.groups():
        table = case_table(s)
        parts += [f"<details><summary>{table.title}</summary>", _markdown(table), "</details>"]
    return "\n\n".join(parts) + "\n"


def as_csv(results: Results) -> str:
    names = [f.name for f in fields(Row)]
    simple = [n for n in names if n not in ("peers", "graph", "ours", "copy", "options", "peer_errors")]
    peers = sorted({name for r in results.rows for name in r.peers})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ours = [f"ours_{k}_s" for k in ("min", "q1", "median", "q3")]
    writer.writerow([*simple, "options", *DERIVED, *ours, "n", *(f"{p}_min_s" for p in peers), "copy_min_s"])
    for r in results.rows:
        t = r.ours
        times = [t.min, t.q1, t.median, t.q3, t.n] if t else [None] * 5
        peer_times = [r.peers[p].min if p in r.peers else None for p in peers]
        first = [size(r) if n == "size" else getattr(r, n) for n in simple]
        derived = [getattr(r, n) for n in DERIVED]
        writer.writerow([*first, json.dumps(r.options), *derived, *times, *peer_times, r.copy and r.copy.min])
    return text.getvalue()
