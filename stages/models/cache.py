"""The user's cache folder, and content hashes of files that are only read again when they changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from schemas.errors import UserError
from schemas.files import sha256, write_json


def cache_folder() -> Path:
    """Where converted and merged models are kept: $XDG_CACHE_HOME/congrad, or ~/.cache/congrad."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "congrad"
    except RuntimeError:  # a user that the password file does not know, without HOME: containers
        raise UserError(
            "There is no home folder to keep converted models in",
            fix="Set XDG_CACHE_HOME (and HF_HOME) to a folder that can be written.",
        ) from None


def file_hashes(paths: Iterable[Path], cache: Path) -> dict[Path, str]:
    """SHA-256 of each file, remembered in cache/hashes.json by (path, size, modification time)."""
    store = cache / "hashes.json"
    known = _load(store)
    hashes: dict[Path, str] = {}
    fresh = False
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key] = sha256(path)
            fresh = True
        hashes[path] = known[key]
    if fresh:
        _save(store, known)
    return hashes


def _load(store: Path) -> dict[str, str]:
    """What is remembered; a missing or damaged file only means hashing again."""
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(store: Path, known: dict[str, str]) -> None:
    """A cache that cannot be written is done without."""
    with suppress(OSError):
        write_json(store, known)
