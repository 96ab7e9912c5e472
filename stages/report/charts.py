"""Charts as inline SVG: histogram, distributions side by side, lines, share bars, changes with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from stages.report.svg import Format, Frame, element, path, picture
from stages.report.text import count, number, short


@dataclass(frozen=True)
class Series:
    """Named values with the CSS class that colours them: bin counts, or y values of a line."""

    name: str
    css: str
    values: Sequence[float]


def bin_counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values fall in each bin; values outside count in the first or the last."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return counts.tolist()


def histogram(
    edges: Sequence[float], stack: Sequence[Series], label: str, *, cut: float | None = None, x_format: Format = short
) -> Markup:
    """Stacked counts per bin; `cut` is a dashed vertical line. `stack` is drawn from the axis upwards."""
    totals = [sum(values) for values in zip(*(s.values for s in stack), strict=True)]
    frame = Frame(edges[0], edges[-1], 0, max(max(totals, default=0), 1))
    parts = frame.axes(x_format, count, y_about=round(min(3, frame.y_high)), x_about=5)
    base = [0.0] * len(totals)
    for series in stack:
        for i, value in enumerate(series.values):
            if value:
                x, top = frame.x(edges[i]), frame.y(base[i] + value)
                note = f"{series.name}: {count(value)} between {number(edges[i])} and {number(edges[i + 1])}"
                bar = element(
                    "rect",
                    element("title", note),
                    x=x + 0.5,
                    y=top,
                    width=frame.x(edges[i + 1]) - x - 1,
                    height=frame.y(base[i]) - top,
                    class_=f"fill-{series.css}",
                )
                parts.append(bar)
            base[i] += value
    if cut is not None and edges[0] <= cut <= edges[-1]:
        x = frame.x(cut)
        parts.append(element("path", d=f"M{x:.1f} {frame.top - 4:g}V{frame.height - frame.bottom:g}", class_="cut"))
    return picture(frame.width, frame.height, label, *parts)


def distributions(edges: Sequence[float], series: Sequence[Series], label: str) -> Markup:
    """Counts per bin of several groups as outlines over one another; the first is filled lightly."""
    frame = Frame(edges[0], edges[-1], 0, max([1.0, *(max(s.values, default=0) for s in series)]))
    parts = frame.axes(short, count, y_about=round(min(3, frame.y_high)), x_about=5)
    for index, group in enumerate(series):
        points = [(frame.x(edges[0]), frame.y(0))]
        for i, value in enumerate(group.values):
            points += [(frame.x(edges[i]), frame.y(value)), (frame.x(edges[i + 1]), frame.y(value))]
        points.append((frame.x(edges[-1]), frame.y(0)))
        if index == 0:
            parts.append(path(points, class_=f"area-{group.css}"))
        parts.append(path(points, class_=f"line-{group.css}"))
    return picture(frame.width, frame.height, label, *parts)


def lines(xs: Sequence[Sequence[float]], series: Sequence[Series], label: str, *, y_format: Format = short) -> Markup:
    """Lines over steps, one x list per series; a single point is a dot."""
    every_x = [x for steps in xs for x in steps]
    every_y = [y for s in series for y in s.values]
    low, high = min(every_y), max(every_y)
    room = (high - low or abs(high) or 1.0) * 0.08
    bottom = 0.0 if low >= 0 and low - room < 0 else low - room
    frame = Frame(min(every_x), max(every_x), bottom, high + room, left=56)
    if frame.x_low == frame.x_high:
        frame = Frame(frame.x_low - 1, frame.x_high + 1, frame.y_low, frame.y_high, left=56)
    parts = frame.axes(short, y_format)
    for steps, group in zip(xs, series, strict=True):
        points = [(frame.x(x), frame.y(y)) for x, y in zip(steps, group.values, strict=True)]
        parts.append(path(points, class_=f"line-{group.css}"))
        x, y = points[-1]
        note = f"{group.name} at step {short(steps[-1])}: {number(group.values[-1])}"
        parts.append(element("circle", element("title", note), cx=x, cy=y, r=3, class_=f"fill-{group.css}"))
    return picture(frame.width, frame.height, label, *parts)


def share_bar(parts: Sequence[Series], label: str) -> Markup:
    """One horizontal bar cut into shares of its whole; each part has one value."""
    total = sum(p.values[0] for p in parts)
    x, drawn = 0.0, []
    for part in parts:
        width = 100 * part.values[0] / total if total else 0.0
        if width:
            note = f"{part.name}: {count(part.values[0])}"
            drawn.append(
                element("rect", element("title", note), x=x, y=0, width=width, height=10, class_=f"fill-{part.css}")
            )
        x += width
    return _strip(label, *drawn)


def value_bar(value: float, low: float, high: float, label: str, css: str) -> Markup:
    """One horizontal bar from 0 to `value` on the scale low..high."""
    span = (high - low) or 1.0
    start, stop = sorted((-100 * low / span, 100 * (value - low) / span))
    width = max(stop - start, 0.6)
    bar = element("rect", element("title", label), x=start, y=0, width=width, height=10, class_=f"fill-{css}")
    mark = element("path", d=f"M{-100 * low / span:.2f} 0V10", class_="base")
    return _strip(label, bar, mark)


@dataclass(frozen=True)
class ChangeBar:
    """A value before and after with its 95% interval; any end may be missing."""

    name: str
    before: float | None
    after: float | None
    before_interval: tuple[float, float] | None
    after_interval: tuple[float, float] | None


def changes(rows: Sequence[ChangeBar], label: str, *, x_format: Format, reference: float | None = None) -> Markup:
    """A row per name: hollow dot before, filled dot after, thin lines for the intervals."""
    values = [v for r in rows for v in (r.before, r.after, *(r.before_interval or ()), *(r.after_interval or ()))]
    seen = [v for v in values if v is not None] + ([reference] if reference is not None else [])
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    room = (high - low or 1.0) * 0.04
    left = 16 + 7.5 * max([2, *(min(len(r.name), 12) for r in rows)])
    frame = Frame(
        low - room, high + room, 0, max(len(rows), 1), width=400, height=34 + 24 * len(rows), left=left, top=6
    )
    parts = frame.axes(x_format, count, y_about=0)
    if reference is not None:
        x = frame.x(reference)
        parts.append(element("path", d=f"M{x:.1f} {frame.top:g}V{frame.height - frame.bottom:g}", class_="cut"))
    for i, row in enumerate(rows):
        y = frame.y(len(rows) - i - 0.5)
        parts.append(element("text", row.name, x=frame.left - 8, y=y + 4, class_="tick end"))
        dots = (("before", row.before, row.before_interval, y - 4), ("after", row.after, row.after_interval, y + 4))
        for name, value, interval, at in dots:
            if value is None:
                continue
            if interval:
                span = f"M{frame.x(interval[0]):.1f} {at:.1f}H{frame.x(interval[1]):.1f}"
                parts.append(element("path", d=span, class_=f"interval-{name}"))
            note = f"{row.name}, {name}: {x_format(value)}"
            parts.append(
                element("circle", element("title", note), cx=frame.x(value), cy=at, r=3.6, class_=f"dot-{name}")
            )
    return picture(frame.width, frame.height, label, *parts)


def _strip(label: str, *children: Markup) -> Markup:
    return element(
        "svg", *children, viewBox="0 0 100 10", preserveAspectRatio="none", role="img", aria_label=label, class_="strip"
    )
