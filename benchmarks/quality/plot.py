"""Reward against tax as an SVG that can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from benchmarks.quality.results import Values

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 440, 70, 50, 20, 190
_FAMILIES = {
    "AdamW": "#888888",
    "DPO beta": "#1f9e89",
    "EMA": "#8c6bb1",
    "LoRA": "#b5651d",
    "offline": "#3182bd",
    "OnDARE": "#e6550d",
    "OnTIES": "#d62790",
    "anchor": "#c9a400",
}
_STYLE = (
    "text{font:12px sans-serif;fill:#444}line,path{stroke:#999}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}line,path{stroke:#777}}"
)
Column = Callable[[Values, Values], float]


def frontier(
    found: Mapping[str, Sequence[Values | None]],
    columns: Mapping[str, Column],
    reward: str = "reward accuracy",
    tax: str = "tax: other tasks",
    untouched: str = "SFT, not trained",
) -> str:
    """A point a method: mean over the seeds there are; a bar from the lowest to the highest. Methods that are missing are not drawn,
    and the picture says how many."""
    points = {}
    for name, values in found.items():
        pairs = [(v, s) for v, s in zip(values, found[untouched], strict=True) if v is not None and s is not None]
        if pairs:
            points[name] = tuple(sorted(columns[c](*pair) for pair in pairs) for c in (tax, reward))
    every = [value for point in points.values() for axis in point for value in axis] or [0.0, 1.0]
    spans = [_span([v for point in points.values() for v in point[axis]] or every) for axis in (0, 1)]

    def x(value: float) -> float:
        return _LEFT + (value - spans[0][0]) / (spans[0][1] - spans[0][0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - spans[1][0]) / (spans[1][1] - spans[1][0]) * (_HEIGHT - _BOTTOM - _TOP)

    drawn = [_axes(spans, x, y, tax, reward)]
    for name, (taxes, rewards) in points.items():
        color = next((c for family, c in _FAMILIES.items() if name.startswith(family)), "#000000")
        cx, cy = x(sum(taxes) / len(taxes)), y(sum(rewards) / len(rewards))
        drawn.append(
            f'<g style="stroke:{color}"><line style="stroke:{color}" x1="{x(taxes[0]):.1f}" x2="{x(taxes[-1]):.1f}" y1="{cy:.1f}" y2="{cy:.1f}" '
            f'opacity=".5"/><line style="stroke:{color}" x1="{cx:.1f}" x2="{cx:.1f}" y1="{y(rewards[0]):.1f}" y2="{y(rewards[-1]):.1f}" opacity=".5"/>'
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{color}"><title>{escape(name)}</title></circle></g>'
        )
    for row, (family, color) in enumerate(_FAMILIES.items()):
        at = _TOP + 18 * row
        drawn.append(
            f'<circle cx="{_WIDTH - _RIGHT + 20}" cy="{at}" r="5" fill="{color}"/><text x="{_WIDTH - _RIGHT + 32}" y="{at + 4}">{family}</text>'
        )
    missing = len(found) - len(points)
    if missing:
        drawn.append(f'<text x="{_WIDTH - _RIGHT + 20}" y="{_TOP + 180}">{missing} methods missing</text>')
    body = "\n".join(drawn)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"><style>{_STYLE}</style>\n{body}\n</svg>\n'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _axes(
    spans: Sequence[tuple[float, float]],
    x: Callable[[float], float],
    y: Callable[[float], float],
    tax: str,
    reward: str,
) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none"/>']
    for step in range(5):
        across, up = (low + (high - low) * step / 4 for low, high in spans)
        parts.append(f'<text x="{x(across):.1f}" y="{bottom + 18}" text-anchor="middle">{across:.2f}</text>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(up) + 4:.1f}" text-anchor="end">{up:.2f}</text>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(tax)}, nats per token (left is better)</text>'
    )
    parts.append(f'<text x="{_LEFT + 6}" y="{_TOP - 6}">{escape(reward)} (up is better)</text>')
    return "\n".join(parts)
