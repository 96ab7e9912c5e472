"""Text for people: numbers with sensible precision, long texts clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SHOWN = 600
_STORED = 6000


@dataclass(frozen=True)
class Clipped:
    """A text cut for display: shown at once, shown on request, and the characters left out altogether."""

    head: str
    tail: str
    missing: int


def clip(text: str) -> Clipped:
    """The first 600 characters, the next 5,400 on request; the rest stays in the table."""
    cut = len(text) if len(text) <= _SHOWN * 1.2 else _SHOWN
    return Clipped(text[:cut], text[cut:_STORED], max(0, len(text) - _STORED))


def count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{round(value):,}"


def number(value: float | None, signed: bool = False) -> str:
    """About three significant digits; a real minus sign; an en dash for nothing."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size >= 1000:
        text = f"{size:,.0f}"
    elif size >= 0.001:
        digits = max(0, 2 - math.floor(math.log10(size)))
        text = f"{size:.{min(digits, 4)}f}"
    else:
        text = f"{size:.1e}"
    return _with_sign(text, value, signed)


def short(value: float) -> str:
    """A round number on an axis or in a legend: no more digits than it has."""
    return f"{value:,.6g}".replace("-", "−") if value == 0 or abs(value) >= 0.001 else number(value)


def fixed(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A fixed number of decimals, for columns that are compared."""
    if value is None or math.isnan(value):
        return "–"
    return _with_sign(f"{abs(value):.{digits}f}", value, signed)


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage; tiny shares are not rounded to none, nor nearly all to all."""
    if value is None or math.isnan(value):
        return "–"
    if 0 < value < 0.5 * 10 ** -(digits + 2):
        return f"<{10**-digits:g}%"
    if 1 > value > 1 - 0.5 * 10 ** -(digits + 2):
        return f">{100 - 10**-digits:g}%"
    return f"{100 * value:.{digits}f}%".replace("-", "−")


def seconds(value: float) -> str:
    """A duration: 8.3 s, 4 min 05 s, 2 h 10 min."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


def spaced(name: str) -> str:
    """A reason code or metric name as words."""
    return name.replace("_", " ")


def _with_sign(text: str, value: float, signed: bool) -> str:
    if value < 0:
        return "−" + text
    return "+" + text if signed and value > 0 else text
