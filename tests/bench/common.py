"""Rows made by hand, and the smallest run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.__main__ import main
from bench.results import Results, Row
from bench.timing import Timing

SMALL = ["--sizes", "1,8,6,6;2,5,3,7", "--seconds", "0", "--peers", "eager", "--device", "cpu"]


def run(*args: str) -> int:
    return main(["run", *SMALL, *args])


def timing(seconds: float, spread: float = 0.01, near: int = 5) -> Timing:
    """Samples from ``seconds`` on; the quartiles are at 1, 2 and 3 times ``spread`` above it."""
    q1, median, q3 = (seconds * (1 + i * spread) for i in (1, 2, 3))
    return Timing(seconds, q1, median, q3, 9, near)


def row(ours: float | None, peers: dict[str, float], **changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "simam",
        "options": {"e_lambda": 0.1},
        "size": (1, 2, 3, 4),
        "dtype": "float32",
        "layout": "contiguous",
        "mode": "fwd",
        "device": "cpu",
        "backend": "cpu",
        "threads": 2,
        "least_bytes": 2_000_000,
        "flops": 1_000_000,
        "problem": None if ours else "Mismatch: output: 3 times the error allowed",
        "ours": timing(ours) if ours else None,
        "peers": {name: timing(t) for name, t in peers.items()},
        "peer_errors": {},
        "copy": timing(1e-3),
        "copy_bytes": 4_000_000,
    }
    return Row(**values | changes)


def save(file: Path, *rows: Row) -> Path:
    Results({"cpu": "a <processor>", "planned_rows": len(rows)}, list(rows)).save(file)
    return file
