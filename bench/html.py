"""A run as one HTML file that needs nothing else: bars of the speed-up, two rooflines, and every figure in tables."""

from __future__ import annotations

from html import escape

from bench import tables
from bench.progress import speed_up
from bench.results import Results, Row, Summary
from bench.svg import SERIES, Bar, Point, bars, scatter
from convblocks.tables import Table

# First those that a colour-blind reader tells apart (Okabe and Ito); all are readable on light and dark paper.
_COLOURS = ("0072b2", "d55e00", "009e73", "cc79a7", "e69f00", "56b4e9", "8a63d2", "7f7f7f", "a0522d", "b8b000")
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #d5d9de; --gain: #0072b2; --loss: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171b; --faint: #3a4047; --gain: #56b4e9; --loss: #ff8c42; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1150px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .tick { opacity: .75; } .grid { stroke: var(--faint); } .one { stroke: var(--ink); stroke-width: 1.5; }
.gain { fill: var(--gain); } .loss { fill: var(--loss); } svg text.bad { fill: var(--loss); font-weight: 600; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } tr.slow td { color: var(--loss); font-weight: 600; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em; }
.legend span { margin-right: 1.2em; white-space: nowrap; } summary { cursor: pointer; }
.key { background: currentColor; } circle { fill: currentColor; stroke: currentColor; stroke-width: 2; }
.hollow { fill: none; }
""" + "\n".join(f".s{i} {{ color: #{c}; }}" for i, c in enumerate(_COLOURS))

_HEAD = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>convblocks against torch</title><style>{_STYLE}</style></head><body>"""
_METHOD = """<p>Speed-up is the time of the best peer over ours, of the shortest samples. The peers are the plain torch
formula, eager and compiled, in both memory formats; they and ours run in turn. A case is timed only if its output, and
its gradients where they are timed, have at most twice the error of torch in that dtype against float64. A "?" marks a
speed-up whose times were not reached repeatedly: the machine was too busy to tell.</p>"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "".join(
        f'<tr class="{"slow" if slow else ""}">{"".join(f"<td>{escape(c)}</td>" for c in row)}</tr>\n'
        for row, slow in zip(table.rows, table.bad, strict=True)
    )
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def _detail(row: Row) -> str:
    lines = [f"{tables.title(row)}, {tables.size(row)}, {row.layout}, backend {row.backend}"]
    if row.problem:
        lines.append(f"parity failed: {row.problem}")
    if row.ours:
        lines.append(f"ours {tables.duration(row.ours.min)}, median {tables.duration(row.ours.median)}, n {row.ours.n}")
    lines += [f"{name} {tables.duration(t.min)}" for name, t in row.peers.items()]
    lines += [f"{name}: {error}" for name, error in row.peer_errors.items()]
    lines.append(f"{tables.number(row.gbps, '.1f')} GB/s, {tables.number(row.copy_share, '.0%')} of a copy")
    return "\n".join(lines)


def _bar(row: Row) -> Bar:
    note = "parity failed" if row.problem else speed_up(row)
    return Bar(f"{tables.size(row)} {row.layout}", row.ratio, note, _detail(row))


def _section(summary: Summary, span: tuple[float, float]) -> str:
    table = tables.case_table(summary)
    return "\n".join(
        [
            f"<h2>{escape(table.title)}</h2>",
            f"<p>Geometric mean {tables.number(summary.mean())} of {len(summary.timed)} cases</p>",
            bars([_bar(r) for r in summary.rows], span),
            f"<details><summary>All figures</summary>{_table(table)}</details>",
        ]
    )


def _rooflines(results: Results) -> list[str]:
    names = list(dict.fromkeys(r.op for r in results.rows))
    timed = [(r, names.index(r.op)) for r in results.rows if r.gbps and r.gflops and r.copy_gbps]
    if not timed:
        return []
    fastest = max(r.copy_gbps or 0.0 for r, _ in timed)
    intensity = [r.flops / r.least_bytes for r, _ in timed]
    ends = [min(intensity) / 1.25, max(intensity) * 1.25]
    roofline = scatter(
        [Point(x, r.gflops or 0.0, i, r.mode != "fwd", _detail(r)) for x, (r, i) in zip(intensity, timed, strict=True)],
        [(x, x * fastest) for x in ends],
        "operations per byte that has to be moved",
        "Gflop/s",
    )
    copies: dict[float, float] = {}
    for r, _ in timed:
        megabytes = r.copy_bytes / 2e6
        copies[megabytes] = max(copies.get(megabytes, 0.0), r.copy_gbps or 0.0)
    by_size = scatter(
        [Point(r.copy_bytes / 2e6, r.gbps or 0.0, i, r.mode != "fwd", _detail(r)) for r, i in timed],
        list(copies.items()),
        "size of the feature map, MB",
        "GB/s of the least bytes",
    )
    legend = "".join(f'<span><i class="key s{i % SERIES}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return [
        "<h2>Roofline</h2>",
        f"<p>The dashed line is what the fastest copy of this run, {fastest:.1f} GB/s, allows.</p>",
        f'<p class="legend">{legend} hollow: forward and backward</p>',
        roofline,
        "<h2>Bandwidth by size</h2>",
        "<p>Bytes that any kernel has to move over our time. The dashed line is a copy of the same feature map.</p>",
        by_size,
    ]


def html(results: Results) -> str:
    header = results.header
    planned, done = header.get("planned_rows"), len(results.rows)
    stopped = f"<p><b>Stopped after {done} of {planned} rows.</b></p>" if done != planned else ""
    ratios = [r.ratio for r in results.rows if r.ratio]
    span = min([0.7, *ratios]), max([2.0, *ratios])  # one for all charts, so that bars compare across them
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>\n" for k, v in header.items())
    body = [
        "<h1>convblocks against torch</h1>",
        f"<p>{escape(tables.machine(header))}</p>{stopped}",
        _METHOD,
        _table(tables.summary_table(results)),
        *(_section(s, span) for s in results.groups()),
        *_rooflines(results),
        f'<details><summary>The machine and the run</summary><div class="table"><table>{facts}</table></div></details>',
    ]
    return "\n".join([_HEAD, *body, "</body></html>\n"])
