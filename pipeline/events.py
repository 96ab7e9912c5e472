"""events.jsonl: what happened in a run, one JSON object a line, for machines that watch it (docs/events.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.secrets import without_secrets

_METER_SECONDS = 30.0


class Events:
    """Appends events; each line is written in one call, so lines of a killed run are whole or absent.

    A line that a full disk or a power cut left without its end is ended first, so that it spoils no other.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as handle:
                handle.write("\n")

    def add(self, event: str, **values: Any) -> None:
        """Append one event with the time in seconds since the epoch."""
        line = without_secrets(json.dumps({"time": round(time.time(), 3), "event": event, **values}, ensure_ascii=True))
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")


class Meter:
    """Writes a `progress` event of a stage every half minute: done, total, rate, the stage's own rates, seconds left."""

    def __init__(self, events: Events, stage: str, round_: int) -> None:
        self._events, self._stage, self._round = events, stage, round_
        self._done, self._total, self._unit, self._before = 0, 0, "", 0
        self._rates: dict[str, float] = {}
        self._begun = self._said = time.monotonic()

    def total(self, amount: int, unit: str, done: int = 0) -> None:
        """The work there is, `done` of it before this run."""
        self._total, self._unit, self._done, self._before = amount, unit, done, done
        self._begun = time.monotonic()

    def advance(self, amount: int, rates: Mapping[str, float]) -> None:
        """`amount` more is done."""
        self._done += amount
        self._rates.update(rates)
        now = time.monotonic()
        if now - self._said < _METER_SECONDS:
            return
        self._said = now
        rate = (self._done - self._before) / max(now - self._begun, 1e-9)
        left = (self._total - self._done) / rate if rate and self._total else None
        self._events.add(
            "progress",
            stage=self._stage,
            round=self._round,
            done=self._done,
            total=self._total or None,
            unit=self._unit,
            per_s=round(rate, 4),
            seconds_left=None if left is None else round(max(left, 0.0)),
            rates={name: round(value, 4) for name, value in self._rates.items()},
        )
