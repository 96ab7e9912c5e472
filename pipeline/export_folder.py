"""The folder that an export writes, and sends to the hub. A mark in it says what its files were: nothing else is ever replaced or
deleted, and no file that was changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipeline.rundir import run_that_owns
from schemas import files
from schemas.errors import UserError, first_line, foreign

MARK = ".congrad-export.json"
_HASHED = 64 * 2**20
"""Bytes; larger files (weights, tables) are known by their size."""


@contextmanager
def exporting(out: Path) -> Iterator[Path]:
    """A folder to write the export to; it appears as `out` when it is whole, in place of an earlier export.

    Raises UserError for a link, for a folder that holds what no export wrote, and for one that cannot be replaced.
    """
    out = Path(os.path.abspath(out))
    _refuse(out)
    with files.publishing(out) as temporary:
        temporary.mkdir()
        yield temporary
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        files.write_json(
            temporary / MARK, {path.relative_to(temporary).as_posix(): _known_by(path) for path in written}
        )


def push(folder: Path, repo: str, kind: Literal["dataset", "model"], private: bool, replaced: Sequence[str]) -> None:
    """Send an exported folder to the hub. replaced: patterns of files there that go when this export has none of that name.

    Raises UserError with what the hub said.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("Pushing needs the package huggingface_hub", fix="pip install huggingface_hub") from error
    api = HfApi()

    def refused(error: Exception) -> UserError:
        return UserError(
            f"Pushing to {repo} failed: {first_line(error)}",
            fix=f"What was exported is in {folder}; `hf auth login`, then export again.",
        )

    with foreign(refused):
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, repo_type=kind, ignore_patterns=[MARK], delete_patterns=list(replaced)
        )


def _refuse(out: Path) -> None:
    if out.is_symlink() or (os.path.lexists(out) and not out.is_dir()):
        raise UserError("This is no folder, or a link to one", where=str(out), fix="Name another folder with --out.")
    if Path.cwd().is_relative_to(out) or os.path.ismount(out):
        raise UserError(
            "An export takes the place of a folder, which this one does not allow",
            where=f"{out}: {'you are in it' if Path.cwd().is_relative_to(out) else 'a disk is mounted there'}",
            fix="Name a folder in it with --out.",
        )
    if (run := run_that_owns(out)) is not None:
        raise UserError(
            "This folder lies where a run keeps its tables, and deletes them when they are made anew",
            where=str(out),
            fix=f"Name a folder outside of {run} with --out, or one beside its tables, such as {run / 'export'}.",
        )
    if not out.is_dir():
        return
    marked = _marked(out / MARK)
    for path in sorted(out.rglob("*")):
        if (path.is_dir() and not path.is_symlink()) or path == out / MARK or files.is_temporary(path):
            continue
        name = path.relative_to(out).as_posix()
        if path.is_symlink() or name not in marked or marked[name] != _known_by(path):
            changed = " that was changed since it was exported" if name in marked else ""
            raise UserError(
                f"This folder holds something else{changed}",
                where=str(path),
                fix="Name an empty folder, or one that an export wrote, with --out.",
            )


def _known_by(path: Path) -> dict[str, object]:
    """What a file is known by: its size, and its content where that is read in a moment."""
    size = path.stat().st_size
    return {"bytes": size, "sha256": files.sha256(path) if size <= _HASHED else None}


def _marked(mark: Path) -> dict[str, object]:
    """Name -> what the file was known by; nothing where there is no mark."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
