"""Results of other settings, kept aside: a stage that fails destroys nothing, and going back to old settings finds them done.

An entry is `_kept/<stage>/<fingerprint>/` beside the tables, and holds what the stage's own place holds: its tables, dropped
rows, artifacts, and its state. The state is the word that the entry is whole: it is the last to be moved in and the first to
be moved out. An entry without it belongs to the state at the stage's own place, and `mend` moves the rest back there; so a
kill or a power cut in the middle of a move loses nothing, whichever way the move went.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.rundir import RunDir
from schemas import files
from stages.spec import StageSpec


class Aside:
    """Moves results of stages aside and back. Only whoever holds the run's lease may."""

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir

    def put(self, spec: StageSpec, round_: int) -> None:
        """Move the stage's results, finished or not, aside; an older entry of the same settings is replaced."""
        plan = self._rundir.plan(spec, round_)
        if plan is None:
            return
        base = self._rundir.base(spec, round_)
        entry = self._rundir.kept(spec, round_) / plan.fingerprint
        self._discard([entry])
        files.make_folder(entry)
        for piece in _pieces(spec):
            _move(base / piece, entry / piece)

    def take(self, spec: StageSpec, round_: int, entry: Path) -> None:
        """Bring an entry back; the stage's own place is clear."""
        base = self._rundir.base(spec, round_)
        for piece in reversed(_pieces(spec)):
            _move(entry / piece, base / piece)
        self._remove_empty(entry)

    def latest(self, spec: StageSpec, round_: int) -> Path | None:
        """The finished entry that was put aside last."""
        state = _pieces(spec)[-1]
        return next((e for e in self._entries(spec, round_) if (e / state / "_stage.json").exists()), None)

    def prune(self, spec: StageSpec, round_: int, keep: int) -> None:
        """Remove all but the `keep` entries that were put aside last, and what has the settings of the stage's own."""
        plan = self._rundir.plan(spec, round_)
        entries = self._entries(spec, round_)
        others = [e for e in entries if plan is None or e.name != plan.fingerprint]
        self._discard(set(entries) - set(others[:keep]))

    def mend(self, steps: Iterable[tuple[StageSpec, int]]) -> None:
        """Undo, or complete, the move that a kill interrupted."""
        for spec, round_ in steps:
            base = self._rundir.base(spec, round_)
            *rest, state = _pieces(spec)
            for entry in self._entries(spec, round_):
                if (entry / state).exists():
                    continue
                for piece in rest:
                    if not (base / piece).exists():
                        _move(entry / piece, base / piece)
                self._discard([entry])

    def _entries(self, spec: StageSpec, round_: int) -> list[Path]:
        """Entries, the last put aside first."""
        folder = self._rundir.kept(spec, round_)
        found = [e for e in folder.iterdir() if not files.is_temporary(e)] if folder.is_dir() else []
        return sorted(found, key=lambda entry: (-entry.stat().st_mtime_ns, entry.name))

    def _discard(self, entries: Iterable[Path]) -> None:
        """Remove entries. They lose their name first: half-removed, they are no entries."""
        for entry in entries:
            if entry.is_dir():
                gone = files.temporary_beside(entry)
                os.replace(entry, gone)
                files.fsync(gone.parent)
                shutil.rmtree(gone)

    def _remove_empty(self, entry: Path) -> None:
        if not any(path.is_file() for path in entry.rglob("*")):
            self._discard([entry])


def _pieces(spec: StageSpec) -> list[str]:
    """Names, below the folder that holds the stage's tables, of all that it wrote; the state is the last."""
    first = spec.writes[0] if spec.writes else spec.name
    artifacts = [spec.name] if spec.kind == "artifact" else []
    return [*spec.writes, f"_dropped/{first}", *artifacts, f"_state/{spec.name}"]


def _move(source: Path, target: Path) -> None:
    """Rename a folder if it is there, durably before the next move."""
    if not source.is_dir():
        return
    files.make_folder(target.parent)
    if target.is_dir():
        shutil.rmtree(target)  # of what no state knows
    os.replace(source, target)
    files.fsync(target.parent)
    files.fsync(source.parent)
