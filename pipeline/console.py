"""What people see while a run goes on: one bar per stage with rate and time left, or plain lines without a terminal."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
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
from rich.segment import Segment
from rich.text import Text

from pipeline.pace import Pace, in_words
from schemas.secrets import less_secrets, without_secrets
from stages.text.visible import visible

_PLAIN_SECONDS = 10.0
_FIRST_SECONDS, _PATIENT_SECONDS = 9.0, 60.0
_LEAVE_SECONDS = 5.0
"""Without news: until the first word that a stage is at work, and between the later ones."""


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control, zero-width and bidirectional characters become [U+XXXX]."""
    return visible(without_secrets(text))


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Bars and warnings of libraries, and what conversions say: not through our console, and not on standard error either. Errors are
    said outside of it."""
    if not quiet:
        yield
        return
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  never closed: loggers of libraries keep it
    with redirect_stderr(nowhere):
        yield


class Terminal(Console):
    """The one way to a terminal: whatever is printed, by whomever, comes out `printable`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Whoever read has enough (`congrad inspect ... | head`): the command ends, and well."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)

    def write_json(self, value: Any, indent: int | None = 2) -> None:
        """A value as JSON, in ASCII: nothing in it can steer a terminal, and nothing that would be masked is in it."""
        self.file.write(json.dumps(less_secrets(value), indent=indent) + "\n")
        self.file.flush()


class _Patient(Terminal):
    """A console that falls silent when its terminal is gone: a run that is told to stop must still reach its end."""

    def __exit__(self, *error: Any) -> None:  # where a console writes what was printed, the bar and the cursor included
        try:
            super().__exit__(*error)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Shows stages, notes and progress on standard error; standard output stays free for results."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = _Patient(stderr=True, quiet=quiet)
        self._bar: StageBar | None = None

    def say(self, message: str, style: str = "") -> None:
        """One line for people."""
        self.console.print(Text(printable(message), style=style), soft_wrap=not self.console.is_terminal)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Work before any stage: said when it takes so long that one wonders, and again every minute."""
        done = threading.Event()

        def wait() -> None:
            seconds = _FIRST_SECONDS
            while not done.wait(seconds):
                self.say(f"  {what} ...", "dim")
                seconds = _PATIENT_SECONDS

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(_LEAVE_SECONDS)  # a terminal that was stopped (Ctrl-S) lets nobody write

    def stage(self, title: str) -> StageBar:
        """Progress of one stage; a context manager."""
        return StageBar(self.console, printable(title))


class StageBar:
    """Progress of one stage: how many of how many, rate, time left, and the stage's own rates."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._pace = Pace()
        self._said, self._patience = time.monotonic(), _FIRST_SECONDS
        self._heard, self._rates = time.monotonic(), ""
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
        self._pace.expect(amount, unit, done)
        if self._task is not None:
            self._live.reset(self._task, total=amount or None, completed=done, unit=unit, rates="")

    def advance(self, amount: int, rates: Mapping[str, float]) -> None:
        """`amount` more is done; rates are shown as they come."""
        self._pace.advance(amount)
        shown = "  ".join(in_words(rates))
        self._heard, self._rates = time.monotonic(), shown
        if self._task is not None:
            self._live.update(self._task, advance=amount, rates=shown)
        elif time.monotonic() - self._said >= _PLAIN_SECONDS:
            self._said = time.monotonic()
            self._console.print(Text(f"  {self._title}: {self._plain()}  {shown}".rstrip()), soft_wrap=True)

    def say(self, message: str) -> None:
        """A line above the bar."""
        line = printable(message).replace("\n", " ⏎ ")  # a note is one line: it cannot pass for another
        self._console.print(Text(f"  {line}", style="yellow"), soft_wrap=not self._console.is_terminal)

    def tick(self) -> None:
        """Called every second: where no news comes for long (a model is loaded, a batch takes minutes), that it goes on is news."""
        now = time.monotonic()
        if self._task is not None:
            if now - self._heard >= _FIRST_SECONDS:
                self._live.update(self._task, rates=f"{self._rates}  at work for {now - self._heard:.0f} s".lstrip())
        elif now - self._said >= self._patience:
            self._said, self._patience = now, _PATIENT_SECONDS
            self._console.print(Text(f"  {self._title}: at work, {self._plain()}"), soft_wrap=True)

    def _plain(self) -> str:
        pace = self._pace
        if not pace.total:
            return f"{pace.done:,} {pace.unit}".rstrip() + f" in {pace.spent:.0f} s"
        left = pace.seconds_left
        if left is None:
            return f"{pace.done:,} of {pace.total:,} {pace.unit} in {pace.spent:.0f} s"
        return f"{pace.done:,} of {pace.total:,} {pace.unit}, about {left:.0f} s left"
