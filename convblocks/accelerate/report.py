"""What accelerate() did, or would do, to each candidate."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Entry:
    """One candidate: a module of a known class.

    Attributes:
        name: of the module in the model; "" is the model itself.
        source: the qualified name of its class before.
        operation: what it can run instead, a name in ``convblocks.ops``.
        backend: what runs the operation; "" where it was not replaced.
        replaced: whether it was (in a dry run: would be).
        reason: why not; or a remark.
        error: the largest relative error of its output and gradients against the original in float64, if compared.
    """

    name: str
    source: str
    operation: str
    backend: str
    replaced: bool
    reason: str
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """The candidates in the order of the model. Prints as a table."""

    model: str
    dry_run: bool = False
    entries: list[Entry] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        return [e for e in self.entries if e.replaced]

    @property
    def skipped(self) -> list[Entry]:
        return [e for e in self.entries if not e.replaced]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        if not self.entries:
            return f"accelerate: nothing to replace: {self.model} has no module of a known class"
        rows = [("module", "class", "operation", "backend", "result", "remark")]
        yes = "would be replaced" if self.dry_run else "replaced"
        for e in self.entries:
            remark = e.reason if e.error is None else f"error {e.error:.0e}"
            rows.append(
                (e.name or "(model)", e.source, e.operation, e.backend, yes if e.replaced else "skipped", remark)
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"accelerate: {len(self.replaced)} of {len(self.entries)} candidates in {self.model} {yes}"
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], total])
