"""What people see while a run goes on: one bar per stage with rate and time left, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from schemas.secrets import without_secrets
from stages.text.visible import visible

_PLAIN_SECONDS = 10.0
_FORESEEABLE = 0.05
"""Least share of the work left at the start that must be done before the time left is guessed."""


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control, zero-width and bidirectional characters become [U+XXXX]."""
    return visible(without_secrets(text))


class Display:
    """Shows stages, notes and progress on standard error; standard output stays free for results."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: StageBar | None = None

    def say(self, message: str, style: str = "") -> None:
        """One line for people."""
        self.console.print(Text(printable(message), style=style), soft_wrap=not self.console.is_terminal)

    def stage(self, title: str) -> StageBar:
        """Progress of one stage; a context manager."""
        return StageBar(self.console, printable(title))


class StageBar:
    """Progress of one stage: how many of how many, rate, time left, and the stage's own rates."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._before, self._done, self._total, self._unit = 0, 0, 0, ""
        self._begun = self._said = time.monotonic()
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[rates]}", style="dim"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> StageBar:
        if self._console.is_terminal:
            self._live.start()
            self._task = self._live.add_task(self._title, total=None, unit="", rates="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._task is not None:
            self._live.stop()

    def total(self, amount: int, unit: str, done: int = 0) -> None:
        """The work there is, `done` of it before this run."""
        self._total, self._unit, self._done, self._before = amount, unit, done, done
        self._begun = time.monotonic()
        if self._task is not None:
            self._live.reset(self._task, total=amount or None, completed=done, unit=unit, rates="")

    def advance(self, amount: int, rates: Mapping[str, float]) -> None:
        """`amount` more is done; rates are shown as they come."""
        self._done += amount
        shown = "  ".join(
            f"{value:,.4g} {name.replace('_per_s', '/s').replace('_', ' ')}" for name, value in rates.items()
        )
        if self._task is not None:
            self._live.update(self._task, advance=amount, rates=shown)
        elif time.monotonic() - self._said >= _PLAIN_SECONDS:
            self._said = time.monotonic()
            self._console.print(Text(f"  {self._title}: {self._plain()}  {shown}".rstrip()), soft_wrap=True)

    def say(self, message: str) -> None:
        """A line above the bar."""
        line = printable(message).replace("\n", " ⏎ ")  # a note is one line: it cannot pass for another
        self._console.print(Text(f"  {line}", style="yellow"), soft_wrap=not self._console.is_terminal)

    def _plain(self) -> str:
        spent = time.monotonic() - self._begun
        if not self._total:
            return f"{self._done:,} {self._unit}".rstrip() + f" in {spent:.0f} s"
        now, left = self._done - self._before, self._total - self._done
        known = now >= _FORESEEABLE * (now + left)
        eta = f", about {spent / now * left:.0f} s left" if now and known else ""
        return f"{self._done:,} of {self._total:,} {self._unit}{eta}"
