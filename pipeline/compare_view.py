"""What `compare` prints: tables that fit the terminal, an arm a column, and the texts that only one arm keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from string import ascii_uppercase

from rich.table import Table
from rich.text import Text

from pipeline.console import Terminal
from pipeline.widths import in_parts, room, width_of
from stages.compare.figures import MEASURES, Comparison, Selected

_LABEL = 26  # columns of a terminal; what is longer wraps
_TEXT = 400


def print_comparison(found: Comparison, as_json: bool) -> None:
    """Print it for people, or as JSON."""
    console = Terminal()
    if as_json:
        console.write_json(asdict(found))
        return
    marks = {arm.name: mark(n) for n, arm in enumerate(found.arms)}
    for arm in found.arms:
        said = (arm.name, f"select.{arm.name}", f"select.by={arm.name}")
        settings = f"  ({' '.join(arm.settings)})" if arm.settings and " ".join(arm.settings) not in said else ""
        console.print(Text(f"{marks[arm.name]}  {arm.name}{settings}"), soft_wrap=True)
    console.print(Text(pool_line(found)), soft_wrap=True)
    for table in _tables(found, marks, room(console), _LABEL if console.is_terminal else None):
        console.print()
        console.print(table)
    for arm in found.arms:
        if arm.examples:
            _print_only(console, arm, marks[arm.name])


def mark(n: int) -> str:
    """A, B, …, Z, A2, B2, …: the name of a column."""
    again, place = divmod(n, len(ascii_uppercase))
    return ascii_uppercase[place] + (str(again + 1) if again else "")


def pool_line(found: Comparison) -> str:
    """What the figures are of, in one sentence."""
    line = f"On the {found.pool:,} of {found.training:,} training pairs that all of them can rank"
    if found.pool == found.training:
        return f"On all {found.pool:,} training pairs."
    missing = [f"{name} {count:,}" for name, count in found.unranked.items() if count]
    return line + (f" (cannot rank: {', '.join(missing)})" if missing else "") + "."


def _tables(found: Comparison, marks: dict[str, str], width: int, label: int | None) -> Iterable[Table]:
    """As many arms a table as `width` has room for. label: the most that labels take of it."""
    labels, pool, *arms = map(list, zip(["", "pool", *marks.values()], *_rows(found, marks), strict=True))
    taken = min(width_of(labels), label or width) + 1 + width_of(pool)
    for part in in_parts(arms, width - taken, 1):
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        table.add_column("", max_width=label, overflow="fold")
        for title, *_ in (pool, *part):
            table.add_column(title, justify="right", no_wrap=True)
        for cells in zip(labels[1:], pool[1:], *(column[1:] for column in part), strict=True):
            table.add_row(*map(Text, cells))
        yield table


def _rows(found: Comparison, marks: dict[str, str]) -> Iterable[list[str]]:
    arms = found.arms
    yield ["pairs kept", f"{found.pool:,}", *(f"{arm.kept:,}" for arm in arms)]
    for language, count in found.languages.items():
        yield [f"  {language}", f"{count:,}", *(f"{arm.languages[language]:,}" for arm in arms)]
    for kind, count in found.errors.items():
        yield [f"known error {kind}", f"{count:,}", *(f"{arm.errors[kind]:,}" for arm in arms)]
    for measure in MEASURES:
        if measure.name in found.means:
            values = [found.means, *(arm.means for arm in arms)]
            yield [_words(measure.name), *(number(value.get(measure.name)) for value in values)]
    for other in found.arms if len(found.arms) > 1 else ():
        shares = ("" if arm.name == other.name else f"{arm.overlap[other.name]:.0%}" for arm in arms)
        yield [f"also kept by {marks[other.name]}", "", *shares]
    if len(found.arms) > 1:
        yield ["kept by no other", "", *(f"{arm.only:,}" for arm in arms)]


def _words(name: str) -> str:
    return "mean " + name.replace("_", " ")


def number(value: float | None) -> str:
    """At most seven characters."""
    if value is None:
        return "–"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def _print_only(console: Terminal, arm: Selected, letter: str) -> None:
    console.print()
    console.print(
        Text(
            f"Only {letter} ({arm.name}) keeps {arm.only:,} pair{'' if arm.only == 1 else 's'}, for example",
            style="bold",
        ),
        soft_wrap=True,
    )
    for example in arm.examples:
        console.print(Text(f"  {example.pair_id} ({example.language})"), soft_wrap=True)
        for side in ("prompt", "chosen", "rejected"):
            text = " ".join(getattr(example, side).split())
            console.print(Text(f"    {side:8} {text[:_TEXT]}{' …' if len(text) > _TEXT else ''}"), soft_wrap=True)
