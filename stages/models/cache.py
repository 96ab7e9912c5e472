"""The user's cache folder, and content hashes of files that are only read again when they changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def cache_folder() -> Path:
    """Where converted and merged models are kept: $XDG_CACHE_HOME/congrad, or ~/.cache/congrad."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "congrad"


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
            with path.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
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
    """Written under another name, then renamed; a cache that cannot be written is done without."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=store.parent, delete=False, encoding="utf-8") as file:
            json.dump(known, file, indent=0)
        os.replace(file.name, store)
    except OSError:
        return
