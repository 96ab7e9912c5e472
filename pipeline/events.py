"""events.jsonl: what happened in a run, one JSON object a line, for machines that watch it (docs/events.md)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.pace import Pace
from schemas.secrets import less_secrets

_METER_SECONDS = 30.0
_FIRST_SECONDS = 9.0
_TENTH = 0.1


class Events:
    """Appends events; each line is written in one call, so lines of a killed run are whole or absent.

    A line that a full disk or a power cut left without its end is ended first, so that it spoils no other.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.exists() and not _ends_its_line(path):
            with path.open("a", encoding="utf-8") as handle:
                handle.write("\n")

    def add(self, event: str, **values: Any) -> None:
        """Append one event with the time in seconds since the epoch."""
        line = json.dumps(less_secrets({"time": round(time.time(), 3), "event": event, **values}), ensure_ascii=True)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def _ends_its_line(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END) if handle.seek(0, os.SEEK_END) else None
        return handle.read() == b"\n"


class Meter:
    """Writes `progress` events of a stage: within ten seconds, when a tenth of the work is done, and every half minute, also while
    nothing advances (a model is loaded, a batch takes minutes). Done, total, rate, the stage's own rates, seconds left, what was done where since
    the stage began in this run."""

    def __init__(self, events: Events, stage: str, round_: int) -> None:
        self._events, self._stage, self._round = events, stage, round_
        self._pace = Pace()
        self._rates: dict[str, float] = {}
        self._places: dict[str, int] = {}
        self._begun = self._said = self._heard = time.monotonic()
        self._patience, self._foreseen = _FIRST_SECONDS, False

    def total(self, amount: int, unit: str, done: int = 0) -> None:
        """The work there is, `done` of it before this run."""
        self._pace.expect(amount, unit, done)

    def advance(self, amount: int, rates: Mapping[str, float], place: str = "") -> None:
        """`amount` more is done, there."""
        self._pace.advance(amount)
        self._rates.update(rates)
        if place:
            self._places[place] = self._places.get(place, 0) + amount
        self._heard = time.monotonic()
        tenth = not self._foreseen and self._pace.share >= _TENTH and self._pace.seconds_left is not None
        if tenth or self._heard - self._said >= _METER_SECONDS:
            self._foreseen |= tenth
            self._say()

    def tick(self) -> None:
        """Called every second."""
        if time.monotonic() - self._said >= self._patience:
            self._say()

    def _say(self) -> None:
        pace, left = self._pace, self._pace.seconds_left
        self._said, self._patience = time.monotonic(), _METER_SECONDS
        self._events.add(
            "progress",
            stage=self._stage,
            round=self._round,
            before=pace.before,
            done=pace.done,
            total=pace.total or None,
            unit=pace.unit,
            per_s=round(pace.per_second, 4),
            seconds_left=None if left is None else round(left),
            silent_s=round(self._said - self._heard),
            places={
                place: {"done": amount, "per_s": round(amount / (self._said - self._begun), 4)}
                for place, amount in sorted(self._places.items())
            },
            rates={name: round(value, 4) for name, value in self._rates.items()},
        )
