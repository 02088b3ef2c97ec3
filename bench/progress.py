"""One line per measured case with the time left; on a terminal with rich, a bar below the lines."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from bench.cases import Case
from bench.results import Row


class Progress(Protocol):
    def done(self, case: Case, rows: list[Row]) -> None: ...


def speed_up(row: Row) -> str:
    if row.problem:
        return f"PARITY FAILED ({row.problem})"
    return "no peer ran" if row.ratio is None else f"{row.ratio:.2f}x{'' if row.settled else '?'}"


class Lines:
    def __init__(self, total: int) -> None:
        self.total, self.count, self.start = total, 0, time.perf_counter()

    def left(self) -> str:
        seconds = round((time.perf_counter() - self.start) / self.count * (self.total - self.count))
        return f"{seconds // 60}:{seconds % 60:02} left"

    def line(self, case: Case, rows: list[Row]) -> str:
        self.count += 1
        results = ", ".join(f"{r.layout} {speed_up(r)}" for r in rows)
        width = len(str(self.total))
        return f"[{self.count:{width}}/{self.total}] {case}: {results}"

    def done(self, case: Case, rows: list[Row]) -> None:
        print(f"{self.line(case, rows)}; {self.left()}", flush=True)


class Bar(Lines):
    """The same lines above a bar."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total)
        columns = TextColumn("benchmark"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        self.bar = RichProgress(*columns, auto_refresh=False)  # a thread that draws would disturb the timing
        self.task = self.bar.add_task("", total=total)

    def done(self, case: Case, rows: list[Row]) -> None:
        self.bar.console.print(self.line(case, rows), markup=False, highlight=False)
        self.bar.update(self.task, completed=self.count, description=self.left(), refresh=True)


class Silent:
    def done(self, case: Case, rows: list[Row]) -> None:
        pass


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Progress]:
    if quiet:
        yield Silent()
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        shown = Bar(total)
        with shown.bar:
            yield shown
    else:
        yield Lines(total)
