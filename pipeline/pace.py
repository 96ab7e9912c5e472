"""How fast a stage goes and how long it will take: one measure, for people's bar and for events."""

from __future__ import annotations

import time
from collections.abc import Mapping

_FORESEEABLE = 0.05
"""Least share of the work left at the start that must be done before the time left is guessed."""


def in_words(rates: Mapping[str, float]) -> list[str]:
    """`tokens_per_s` -> `120 tokens/s`."""
    return [f"{value:,.4g} {name.replace('_per_s', '/s').replace('_', ' ')}" for name, value in rates.items()]


class Pace:
    """Counts work that is done. The clock of the rate starts at the first news: until then a model was loaded, and that is not
    how fast the work goes."""

    def __init__(self) -> None:
        self.done, self.total, self.unit = 0, 0, ""
        self._start(0)

    def expect(self, amount: int, unit: str, done: int = 0) -> None:
        """The work there is, `done` of it before this run."""
        self.total, self.unit, self.done = amount, unit, done
        self._start(done)

    def _start(self, done: int) -> None:
        self.begun = time.monotonic()
        self.before = done
        self._first: tuple[float, int] | None = None

    def advance(self, amount: int) -> None:
        """`amount` more is done."""
        self.done += amount
        if self._first is None and amount:
            self._first = (time.monotonic(), self.done)

    @property
    def spent(self) -> float:
        """Seconds since the work was known."""
        return time.monotonic() - self.begun

    @property
    def share(self) -> float:
        """Of the work that was left at the start, what is done; 0 where that is not known."""
        left = self.total - self.before
        return (self.done - self.before) / left if left > 0 else 0.0

    @property
    def per_second(self) -> float:
        """Units a second since the first news; before there is more than one, since the beginning. 0: unknown."""
        if self._first is not None and self.done > self._first[1]:
            return (self.done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-9)
        return (self.done - self.before) / max(self.spent, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None where it cannot be known yet: before there was news twice, and enough was done."""
        known = self._first is not None and self.done > self._first[1]
        if not known or self.share < _FORESEEABLE or not self.per_second:
            return None
        return max(self.total - self.done, 0) / self.per_second
