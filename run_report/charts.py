"""Line charts as inline SVG. Colours come from the page's style sheet, so that one drawing serves dark and light."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 250  # units of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 40
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # lines differ in more than colour
MOST_DOTS = 300  # of a line
COLOURS = 7  # classes c0 to c6 of the style sheet


@dataclass(frozen=True)
class Line:
    """One line of a chart: ``points`` are (x, y); ``style`` chooses its colour and, above the first, its dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dash: int = 0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, at most ``count`` + 1, from inside ``low`` to ``high``."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    divider: tuple[float, str] | None = None,
    shown: Sequence[float] = (),
) -> str:
    """A figure with axes, grid and legend; every point shows its value when it is pointed at.

    Args:
        divider: x position of a vertical line, and what begins there.
        shown: values that the y axis shows in any case: charts with the same ones can be compared, and next to nothing
            looks like it.
    """
    lines = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.style, line.dash) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + list(shown)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    margin = (max(ys) - min(ys)) * 0.05 or abs(max(ys)) * 0.05 or 1.0
    low_y, high_y = min(ys) - margin, max(ys) + margin
    if min(ys) >= 0:
        low_y = max(low_y, 0.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += _axes(place, (low_x, high_x), (low_y, high_y), x_label, y_label)
    if divider is not None and low_x < divider[0] < high_x:
        x = place(divider[0], low_y)[0]
        parts.append(f'<line class="divider" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 10}" text-anchor="middle">{escape(divider[1])}</text>')
    parts += [_drawn(line, [place(x, y) for x, y in line.points]) for line in lines]
    parts.append("</svg>")
    legend = "".join(_legend_entry(line) for line in lines) if len(lines) > 1 else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}<div class=legend>{legend}</div></figure>"


def _axes(
    place: Callable[[float, float], tuple[float, float]],
    xs: tuple[float, float],
    ys: tuple[float, float],
    x_label: str,
    y_label: str,
) -> list[str]:
    """Grid, numbers and names of both axes; whole numbers only along x."""
    parts = []
    for value in ticks(*ys):
        y = place(xs[0], value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(*xs, 6):
        if value == int(value):
            x = place(value, ys[0])[0]
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
            )
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="label" x="4" y="{TOP - 10}">{escape(y_label)}</text>')  # beside no tick, however long
    return parts


def _drawn(line: Line, places: list[tuple[float, float]]) -> str:
    """The line and a dot a point; dots grow few where points are many."""
    colour, dash = f"c{line.style % COLOURS}", DASHES[line.dash % len(DASHES)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="{colour}" points="{path}"' + (f' stroke-dasharray="{dash}"/>' if dash else "/>")
    radius = 3 if len(places) <= 40 else 1.5
    every = math.ceil(len(places) / MOST_DOTS)
    for (x, y), (at, value) in list(zip(places, line.points, strict=True))[::every]:
        hint = f"{escape(line.name)}, {at:g}: {value:.4g}"
        drawn += f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{hint}</title></circle>'
    return drawn


def _legend_entry(line: Line) -> str:
    dash = DASHES[line.dash % len(DASHES)]
    sample = f'<line class="c{line.style % COLOURS}" x1="0" x2="26" y1="6" y2="6" stroke-dasharray="{dash}"/>'
    return f'<span><svg class=sample viewBox="0 0 26 12">{sample}</svg>{escape(line.name)}</span>'
