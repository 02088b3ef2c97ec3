"""The two charts of a report as inline SVG: bars around 1 on a logarithmic scale, and points on two such scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

SERIES = 10  # colours that the style sheet knows


@dataclass(frozen=True)
class Bar:
    label: str
    value: float | None  # None: nothing to draw but the note
    note: str
    detail: str  # shown on hover


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "", more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def bars(items: list[Bar], span: tuple[float, float]) -> str:
    """A bar per item from 1 to its value. The scale is logarithmic: half as fast is as long as twice as fast."""
    left, width, right, height = 250, 560, 110, 22
    low, high = map(math.log2, span)
    bottom = height * len(items)

    def x(value: float) -> float:
        return left + (math.log2(value) - low) / (high - low) * width

    parts = [f'<svg viewBox="0 0 {left + width + right} {bottom + 26}" role="img">']
    for t in [2.0**e for e in range(math.ceil(low), math.floor(high) + 1)]:
        parts.append(_line("one" if t == 1 else "grid", x(t), 0, x(t), bottom))
        parts.append(_text(x(t), bottom + 16, f"{t:g}x", "middle", "tick"))
    for i, b in enumerate(items):
        y, middle = i * height + 3, i * height + height / 2 + 4
        start, end = sorted((x(1.0), x(b.value or 1.0)))
        parts.append(f"<g><title>{escape(b.detail)}</title>")
        parts.append(_text(left - 8, middle, b.label, "end"))
        if b.value:
            kind = "gain" if b.value >= 1 else "loss"
            size = f'width="{end - start:.1f}" height="{height - 6}"'
            parts.append(f'<rect class="{kind}" x="{start:.1f}" y="{y}" {size}/>')
        parts.append(_text(end + 6, middle, b.note, kind="" if b.value and b.value >= 1 else "bad") + "</g>")
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    series: int
    hollow: bool
    detail: str


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two values."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]


def scatter(points: list[Point], line: list[tuple[float, float]], x_name: str, y_name: str) -> str:
    """Points and a line that limits them; both scales are logarithmic."""
    left, top, width, height = 70, 10, 640, 320
    bottom, right = top + height, left + width
    xs, ys = zip(*[(p.x, p.y) for p in points], *line, strict=True)
    x0, x1, y0, y1 = min(xs) / 1.3, max(xs) * 1.3, min(ys) / 1.3, max(ys) * 1.3

    def across(x: float) -> float:
        return left + math.log(x / x0) / math.log(x1 / x0) * width

    def up(y: float) -> float:
        return bottom - math.log(y / y0) / math.log(y1 / y0) * height

    parts = [f'<svg viewBox="0 0 {right + 20} {bottom + 42}" role="img">']
    for t in _ticks(x0, x1):
        parts += [_line("grid", across(t), top, across(t), bottom)]
        parts += [_text(across(t), bottom + 16, f"{t:g}", "middle", "tick")]
    for t in _ticks(y0, y1):
        parts += [_line("grid", left, up(t), right, up(t)), _text(left - 6, up(t) + 4, f"{t:g}", "end", "tick")]
    parts.append(_text(left + width / 2, bottom + 36, x_name, "middle", "tick"))
    turned = f'transform="rotate(-90 14 {top + height / 2})"'
    parts.append(_text(14, top + height / 2, y_name, "middle", "tick", turned))
    roof = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in sorted(line))
    parts.append(f'<polyline class="roof" points="{roof}"/>')
    for p in points:
        kind = f"s{p.series % SERIES}" + " hollow" * p.hollow
        place = f'cx="{across(p.x):.1f}" cy="{up(p.y):.1f}" r="4"'
        parts.append(f'<circle class="{kind}" {place}><title>{escape(p.detail)}</title></circle>')
    return "\n".join([*parts, "</svg>"])
