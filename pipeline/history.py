"""What events.jsonl says of a run's recent past: its last error, and how far the stage at work is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UNSAID = "The last run ended without a word: it was killed, or the machine went down."
_BLOCK = 2**16  # bytes


def backwards(folder: Path) -> Iterator[dict[str, Any]]:
    """Events, the newest first; lines that are not whole are left out."""
    for line in _lines_backwards(folder / "events.jsonl"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Read from the end, as far as is asked for: the events of many parts are hundreds of megabytes."""
    try:
        handle = path.open("rb")
    except OSError:
        return
    with handle:
        end, rest = handle.seek(0, os.SEEK_END), b""
        while end > 0:
            begin = max(0, end - _BLOCK)
            handle.seek(begin)
            rest, *lines = (handle.read(end - begin) + rest).split(b"\n")
            yield from reversed(lines)
            end = begin
        yield rest


def last_error(folder: Path, running: bool) -> dict[str, Any] | None:
    """How the last run ended, if not well: time, error, kind (user | defect | stopped | killed), exit_code."""
    for event in backwards(folder):
        if event.get("event") == "run_ended":
            if event.get("ok"):
                return None
            return {name: event.get(name) for name in ("time", "error", "kind", "exit_code")}
        if event.get("event") == "run_started":
            unsaid = {"time": event.get("time"), "error": _UNSAID, "kind": "killed", "exit_code": None}
            return None if running else unsaid
    return None


def progress(folder: Path) -> dict[str, Any] | None:
    """The newest `progress` event of the stage that was started last, if it is still at work."""
    for event in backwards(folder):
        if event.get("event") == "progress":
            return event
        if event.get("event") in ("stage_started", "stage_done", "run_started", "run_ended"):
            return None
    return None
