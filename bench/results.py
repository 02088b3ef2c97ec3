"""A run on disk: a header and one row per case and layout, as JSON. Tables, reports and comparisons come from it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.timing import Timing

FORMAT = "convblocks-bench/1"


def geometric_mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


@dataclass(frozen=True)
class Row:
    op: str
    options: dict[str, Any]
    size: tuple[int, ...]
    dtype: str
    layout: str
    mode: str
    device: str
    backend: str  # that ran ours
    threads: int
    least_bytes: int
    flops: int
    problem: str | None  # why ours failed its parity check; it is not timed then
    ours: Timing | None
    peers: dict[str, Timing]
    peer_errors: dict[str, str]  # of the peers that cannot run the case
    copy: Timing | None  # of a tensor like the feature map
    copy_bytes: int  # that this copy reads and writes
    graph: dict[str, Timing] = field(default_factory=dict)  # ours and the peers replayed as CUDA graphs

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows of two runs the same case; not the backend and the threads, which one may compare."""
        return (*self.group, self.size, self.layout)

    @property
    def group(self) -> tuple[Any, ...]:
        return (self.op, json.dumps(self.options, sort_keys=True), self.mode, self.dtype, self.device)

    @property
    def verified(self) -> bool:
        return self.problem is None

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=lambda name: self.peers[name].min, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer, of the shortest times."""
        best = self.best_peer
        return self.peers[best].min / self.ours.min if best and self.ours else None

    @property
    def settled(self) -> bool:
        """Whether the two times of the ratio were reached repeatedly; if not, the machine was too busy to tell."""
        best = self.best_peer
        return bool(best and self.peers[best].settled and self.ours and self.ours.settled)

    @property
    def median_ratio(self) -> float | None:
        best = min((t.median for t in self.peers.values()), default=None)
        return best / self.ours.median if best and self.ours else None

    @property
    def graph_ratio(self) -> float | None:
        best = min((t.min for name, t in self.graph.items() if name != "ours"), default=None)
        return best / self.graph["ours"].min if best and "ours" in self.graph else None

    @property
    def gbps(self) -> float | None:
        return self.least_bytes / self.ours.min / 1e9 if self.ours else None

    @property
    def copy_gbps(self) -> float | None:
        return self.copy_bytes / self.copy.min / 1e9 if self.copy else None

    @property
    def copy_share(self) -> float | None:
        """Of the speed of a copy; above 1 where a copy of this size is bound by something else than the memory."""
        return self.gbps / self.copy_gbps if self.gbps and self.copy_gbps else None

    @property
    def gflops(self) -> float | None:
        return self.flops / self.ours.min / 1e9 if self.ours else None


DERIVED = (
    *("verified", "best_peer", "ratio", "settled", "median_ratio", "graph_ratio"),
    *("gbps", "copy_gbps", "copy_share", "gflops"),
)


@dataclass(frozen=True)
class Summary:
    """Rows of one operation with one set of options, mode, dtype and device."""

    rows: list[Row]

    @property
    def timed(self) -> list[Row]:
        return [r for r in self.rows if r.ratio is not None]

    def mean(self, layout: str | None = None) -> float | None:
        return geometric_mean(r.ratio for r in self.timed if r.ratio and layout in (None, r.layout))

    @property
    def worst(self) -> Row | None:
        return min(self.timed, key=lambda r: r.ratio or 0.0, default=None)


@dataclass
class Results:
    header: dict[str, Any]
    rows: list[Row]

    def groups(self) -> list[Summary]:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return [Summary(rows) for rows in groups.values()]

    def save(self, file: Path) -> None:
        """Whole or not at all: a run that is stopped while it writes leaves the file of the case before."""
        rows = [dataclasses.asdict(r) | {name: getattr(r, name) for name in DERIVED} for r in self.rows]
        text = json.dumps({"format": FORMAT, "header": self.header, "rows": rows}, indent=1)
        part = file.with_name(f"{file.name}.part")
        part.write_text(text + "\n")
        os.replace(part, file)

    @classmethod
    def load(cls, file: Path) -> Results:
        """Raises ValueError with the file's name for whatever is not such a file."""
        try:
            data = json.loads(file.read_text())
        except OSError as e:
            raise ValueError(f"{file}: expected a readable file, got {e.strerror}") from e
        except ValueError as e:
            raise ValueError(f"{file}: expected JSON, got {e}") from e
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        if found != FORMAT:
            raise ValueError(f"{file}: expected the JSON of a benchmark run (format {FORMAT}), got {found}")
        try:
            return cls(dict(data["header"]), [_row(r) for r in data["rows"]])
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file}: expected complete rows, got a row or header that lacks {e}") from e


def _row(data: dict[str, Any]) -> Row:
    def timing(t: dict[str, Any] | None) -> Timing | None:
        return None if t is None else Timing(**t)

    values = {f.name: data[f.name] for f in dataclasses.fields(Row)}
    values["size"] = tuple(values["size"])
    values["ours"], values["copy"] = timing(values["ours"]), timing(values["copy"])
    for name in ("peers", "graph"):
        values[name] = {peer: Timing(**t) for peer, t in values[name].items()}
    return Row(**values)
