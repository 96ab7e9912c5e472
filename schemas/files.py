"""Publishing files and folders so that a crash between any two operations leaves the old state or the new one, never half.

What is published is written under a temporary name on the same file system, flushed (a folder: with all that is in it),
renamed, and the folder that names it is flushed. Everything that must outlive a crash goes through `publish`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from schemas.manifests import FileRecord

_BLOCK, _LARGE = 2**16, 2**24


def fsync(path: Path) -> None:
    """Flush a file or a folder's own entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Flush a file, or a folder with everything in it, the inner things first."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            if not inner.is_symlink():
                fsync_tree(inner)
    fsync(path)


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
    """Make a finished temporary file or folder appear under its final name, durably. It replaces what had the name: a file in
    one step; a folder is moved aside first, so that a crash in between leaves none, and never a mixture.
    """
    open_up(temporary)
    fsync_tree(temporary)
    make_folder(final.parent)
    aside = temporary_beside(final) if temporary.is_dir() and final.is_dir() else None
    if aside is not None:
        os.replace(final, aside)
    os.replace(temporary, final)
    fsync(final.parent)
    if aside is not None:
        shutil.rmtree(aside)


def move(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Give files that are whole and flushed their own names, durably."""
    folders: dict[Path, None] = {}
    for temporary, own in pairs:
        make_folder(own.parent)
        os.replace(temporary, own)
        folders[own.parent] = None
    for folder in folders:
        fsync(folder)


def open_up(path: Path) -> None:
    """Give the files in a folder, or a file, that a library made for their owner alone (safetensors: 0600) the permissions that any new
    file has here."""
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    private = [p for p in found if p.is_file() and not p.is_symlink() and not stat.S_IMODE(p.stat().st_mode) & 0o077]
    if not private:
        return
    probe = temporary_beside(path)
    probe.touch()  # what the umask, or the folder's default permissions, make of a new file
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for file in private:
        file.chmod(mode)


def temporary_beside(final: Path) -> Path:
    """An unused name in the same folder, hence on the same file system. What a kill leaves under it, `is_temporary` knows."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether the name is one of `temporary_beside`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def publishing(final: Path) -> Iterator[Path]:
    """A temporary name to write a file or a folder under; published as `final` at the end, removed after an error."""
    make_folder(final.parent)
    temporary = temporary_beside(final)
    try:
        yield temporary
        publish(temporary, final)
    except BaseException:
        with suppress(OSError):  # the error itself is what must be heard
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically and durably."""
    with publishing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes, where there are very many: what opens files in Python asks for much else, and takes four times as long."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        blocks = [os.read(descriptor, _BLOCK)]
        while blocks[-1]:
            blocks.append(os.read(descriptor, _BLOCK if len(blocks[-1]) < _BLOCK else _LARGE))
    finally:
        os.close(descriptor)
    return b"".join(blocks)


def have_sizes(root: Path, records: Iterable[FileRecord]) -> bool:
    """Whether all of the recorded files are there with the recorded sizes."""
    folder, stat_of = f"{root}/", os.stat  # Path costs more than the call, hundreds of thousands of times
    try:
        for record in records:
            if stat_of(folder + record.path).st_size != record.bytes:
                return False
    except OSError:
        return False
    return True


def is_intact(root: Path, file: FileRecord, *, thorough: bool) -> bool:
    """Whether a recorded file is there with the recorded size and, if thorough, the recorded hash."""
    return have_sizes(root, [file]) and (not thorough or sha256(root / file.path) == file.sha256)


def await_whole(root: Path, records: Iterable[FileRecord], seconds: float, *, thorough: bool) -> list[FileRecord]:
    """Wait until recorded files are seen as they were written (`is_intact`), so many seconds at most: on a shared file system another
    machine's may be seen late. Returns those that are not."""
    deadline, pause = time.monotonic() + seconds, 0.01
    missing = list(records)
    while missing := [record for record in missing if not is_intact(root, record, thorough=thorough)]:
        if time.monotonic() > deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return missing


def remove(paths: Iterable[Path]) -> None:
    """Delete files that may already be gone, durably."""
    folders = set()
    for path in paths:
        if path.exists():
            path.unlink(missing_ok=True)
            folders.add(path.parent)
    for folder in folders:
        fsync(folder)
