"""The small vocabulary all charts share: escaped elements, scales, ticks and axes. Colours come from CSS classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from stages.text.visible import visible

Format = Callable[[float], str]


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element with everything escaped. `class_` is written class, other underscores become hyphens."""
    parts = [
        f'{key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    body = Markup("").join(child if isinstance(child, Markup) else visible(child) for child in children)
    return Markup("<{0}>{1}</{2}>").format(Markup(" ".join([name, *parts])), body, Markup(name))


def picture(width: float, height: float, label: str, *children: str, class_: str = "chart") -> Markup:
    """A whole <svg> with a text alternative; it scales with its column."""
    return element("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_=class_)


def path(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """A polyline through `points`."""
    return element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), **attributes)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `about` of them."""
    if not high > low:
        return [low]
    span = high - low
    unit = 10.0 ** math.floor(math.log10(span / about))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """A plot area with linear scales: data in, picture coordinates out."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: float = 320
    height: float = 170
    left: float = 44
    right: float = 12
    top: float = 10
    bottom: float = 26

    def x(self, value: float) -> float:
        """Horizontal position."""
        share = (value - self.x_low) / (self.x_high - self.x_low or 1.0)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Vertical position: large values are high up."""
        share = (value - self.y_low) / (self.y_high - self.y_low or 1.0)
        return self.height - self.bottom - share * (self.height - self.bottom - self.top)

    def axes(self, x_format: Format, y_format: Format, y_about: int = 3, x_about: int = 4) -> list[Markup]:
        """Horizontal grid lines with their values (none for y_about 0), and values along the bottom."""
        floor = self.height - self.bottom
        parts = []
        for tick in ticks(self.y_low, self.y_high, y_about) if y_about else []:
            y = self.y(tick)
            parts.append(element("path", d=f"M{self.left:g} {y:.1f}H{self.width - self.right:g}", class_="grid"))
            parts.append(element("text", y_format(tick), x=self.left - 6, y=y + 3.5, class_="tick end"))
        for tick in ticks(self.x_low, self.x_high, x_about):
            x = self.x(tick)
            parts.append(element("path", d=f"M{x:.1f} {floor:g}v4", class_="axis"))
            parts.append(element("text", x_format(tick), x=x, y=floor + 16, class_="tick mid"))
        parts.append(element("path", d=f"M{self.left:g} {floor:g}H{self.width - self.right:g}", class_="axis"))
        return parts


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(str(value))
