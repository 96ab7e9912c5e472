"""Which checkpoint a run resumes from.

A checkpoint is a folder `checkpoint-<step>` as transformers writes it: weights as safetensors, trainer_state.json, and
optimizer.pt, scheduler.pt, rng_state.pth, which are torch archives by transformers' design and which it reads with
`weights_only=True` (no code runs). Where the weights were cut over processes, the folders `weights` and `optimizer` hold what
each of them wrote (`rows.py`), and optimizer.pt the little that is left. transformers writes files straight into the final folder, so a killed run may leave
a folder that looks finished. The marker `complete.json` is written last, after every file was flushed to disk: it lists
the files with their sizes and the identity of the run. A folder without a fitting marker is not resumed from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from schemas import files

MARKER = "complete.json"
WEIGHTS, STATE = "weights", "optimizer"


def holds_rows(folder: Path) -> bool:
    """Whether the weights of a checkpoint were cut over the processes that wrote it."""
    return (folder / WEIGHTS).is_dir()


def mark_complete(folder: Path, identity: str, step: int, parts: Sequence[str] = ("",)) -> None:
    """Flush every file of the checkpoint, then publish the marker. parts: the files and folders in it that
    count (default: all)."""
    sizes = {}
    files.open_up(folder)
    found = [path for part in parts for path in (folder / part, *(folder / part).rglob("*"))]
    for file in sorted(p for p in found if p.is_file() and p.name != MARKER):
        files.fsync(file)
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    for inner in {(folder / name).parent for name in sizes}:
        files.fsync(inner)
    files.write_json(folder / MARKER, {"identity": identity, "step": step, "files": sizes})
    files.fsync(folder.parent)


def is_complete(folder: Path, identity: str) -> bool:
    """Whether the marker is there, belongs to this run, and every file it lists has its size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["identity"] != identity:
            return False
        return all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def clear(folder: Path) -> None:
    """Remove what a kill left of files and folders that were being published in a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if files.is_temporary(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def resumable(root: Path, identity: str, note: Callable[[str], None]) -> Path | None:
    """The latest complete checkpoint of this run under `root`; incomplete or foreign ones are removed aloud."""
    found: dict[int, Path] = {}
    for folder in sorted(root.glob("checkpoint-*")):
        step = folder.name.removeprefix("checkpoint-")
        if not folder.is_dir() or not step.isdigit():
            continue
        if is_complete(folder, identity):
            found[int(step)] = folder
        else:
            note(f"removed {folder.name}: unfinished, or of another configuration")
            shutil.rmtree(folder)
    return found[max(found)] if found else None
