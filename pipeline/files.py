"""Publishing files so that a crash between any two operations leaves the old state or the new one, never half.

A file is written under a temporary name on the same file system, fsynced, renamed, and its folder fsynced.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from schemas.manifests import FileRecord


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and the ones above it, durably: a new folder is lost with what is in it until its parent is
    flushed.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync(folder.parent)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished temporary file appear under its final name, durably."""
    fsync(temporary)
    make_folder(final.parent)
    os.replace(temporary, final)
    fsync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically and durably."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically and durably."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def record(root: Path, path: Path, table: str | None = None, rows: int | None = None) -> FileRecord:
    """Describe a published file."""
    return FileRecord(
        path=path.relative_to(root).as_posix(),
        table=table,
        rows=rows,
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )


def is_intact(root: Path, file: FileRecord, *, thorough: bool) -> bool:
    """Whether a recorded file is there with the recorded size and, if thorough, the recorded hash."""
    try:
        if os.stat(f"{root}/{file.path}").st_size != file.bytes:  # Path costs more than the call, 10,000 times
            return False
    except OSError:
        return False
    return not thorough or sha256(root / file.path) == file.sha256


def remove(paths: Iterable[Path]) -> None:
    """Delete files that may already be gone, durably."""
    folders = set()
    for path in paths:
        if path.exists():
            path.unlink(missing_ok=True)
            folders.add(path.parent)
    for folder in folders:
        fsync(folder)
