"""A table of text: by rich on a terminal where it is installed, in plain columns elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    bad: list[bool] = field(default_factory=list)

    def add(self, *cells: str, bad: bool = False) -> None:
        self.rows.append(cells)
        self.bad.append(bad)

    def __str__(self) -> str:
        lines = [tuple(self.columns), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join((self.title, *(f"  {line}" for line in padded)))

    def print(self) -> None:
        if not (sys.stdout.isatty() and importlib.util.find_spec("rich")):
            print(f"{self}\n")
            return
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(*self.columns, title=self.title, title_justify="left", title_style="bold")
        for cells, bad in zip(self.rows, self.bad, strict=True):
            table.add_row(*map(Text, cells), style="red" if bad else None)
        Console().print(table)
