"""events.jsonl: what happened in a run, one JSON object a line, for machines that watch it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


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
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, ensure_ascii=True)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
