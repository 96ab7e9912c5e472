"""Tables that fit a terminal: columns in as many parts as its width asks for, and no cell cut."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len

from pipeline.console import Terminal

_WIDE = 1000
"""Columns, where nobody looks at a terminal: nothing need be cut."""


def room(console: Terminal) -> int:
    """The width for tables, which the console has from now on: `print(width=...)` can only narrow it."""
    if not console.is_terminal:
        console.width = _WIDE
    return console.width


def in_parts(columns: Iterable[list[str]], width: int, gap: int) -> list[list[list[str]]]:
    """Columns of a header and its cells, each `gap` after what is before it: in as many parts as `width` asks for."""
    parts: list[list[list[str]]] = []
    used = 0
    for column in columns:
        needed = gap + width_of(column)
        if not parts or used + needed > width:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += needed
    return parts


def width_of(column: Iterable[str]) -> int:
    """The columns of a terminal that the widest line takes."""
    return max(cell_len(line) for cell in column for line in cell.split("\n"))
