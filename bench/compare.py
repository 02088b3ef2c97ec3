"""Two runs against each other: what became slower or faster, and what of it is more than noise."""

from __future__ import annotations

from dataclasses import dataclass

from bench import tables
from bench.results import Results, Row, geometric_mean
from bench.run import FAILED
from convblocks.tables import Table


@dataclass(frozen=True)
class Change:
    a: Row
    b: Row

    @property
    def time(self) -> float | None:
        """Our time in b over that in a: above 1 is slower."""
        return self.b.ours.min / self.a.ours.min if self.a.ours and self.b.ours else None

    @property
    def speed_up(self) -> float | None:
        """The speed-up in b over that in a: below 1 is worse. It does not change with the machine's mood."""
        return self.b.ratio / self.a.ratio if self.a.ratio and self.b.ratio else None

    @property
    def significant(self) -> bool:
        """The middle halves of the samples of ours do not overlap."""
        a, b = self.a.ours, self.b.ours
        return a is not None and b is not None and (a.q3 < b.q1 or b.q3 < a.q1)

    def regressed(self, by: float) -> bool:
        """Slower by more than ``by`` both in time and against the peers, beyond the spread; or no longer right."""
        if self.a.verified and not self.b.verified:
            return True
        slower = self.time is not None and self.time > 1 + by
        behind = self.speed_up is None or self.speed_up < 1 / (1 + by)
        return self.significant and slower and behind


def compare(a: Results, b: Results, fail_over: float | None) -> int:
    """Prints the comparison. Raises ValueError if the runs have no case in common."""
    before = {r.key: r for r in a.rows}
    changes = [Change(before[r.key], r) for r in b.rows if r.key in before]
    if not changes:
        raise ValueError("expected two runs with cases in common, got none")
    limit = fail_over or 0.0
    columns = ["case", "time A", "time B", "B / A", "speed-up A", "speed-up B", "B / A", "significant"]
    table = Table("A against B", columns)
    for c in changes:
        times = [tables.duration(r.ours.min) if r.ours else "PARITY FAILED" for r in (c.a, c.b)]
        ratios = [tables.number(value) for value in (c.time, c.a.ratio, c.b.ratio, c.speed_up)]
        name = f"{c.b.op} {c.b.mode} {c.b.dtype} {c.b.device} {tables.size(c.b)} {c.b.layout}"
        table.add(name, *times, *ratios, "yes" if c.significant else "no", bad=c.regressed(limit))
    tables.show(table)
    for name, results in (("A", a), ("B", b)):
        print(f"{name}: {tables.machine(results.header)}, commit {results.header.get('git') or 'unknown'}")
    time = geometric_mean(c.time for c in changes if c.time)
    speed_up = geometric_mean(c.speed_up for c in changes if c.speed_up)
    print(f"geometric means of B / A: time {tables.number(time)}, speed-up {tables.number(speed_up)}")
    only = {"A": len(before) - len(changes), "B": len(b.rows) - len(changes)}
    for name, count in only.items():
        if count:
            print(f"{count} rows are only in {name}")
    if fail_over is None:
        return 0
    regressed = [c for c in changes if c.regressed(limit)]
    for c in regressed:
        what = f"slower by more than {fail_over:.3g}" if c.b.verified else "no longer right"
        print(f"{what}: {tables.title(c.b)}, {tables.size(c.b)}, {c.b.layout}")
    return FAILED if regressed else 0
