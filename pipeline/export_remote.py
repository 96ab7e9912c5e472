"""Send an exported folder to an object store (s3://, gs://, any scheme that fsspec knows)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.export_folder import MARK
from schemas.errors import UserError, first_line, foreign

_UNFINISHED = ".congrad-export-unfinished.json"
"""Names what a copy that broke may have left."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(out: str) -> bool:
    """Whether it is a URL, not a folder."""
    return _URL.match(out) is not None


def send(folder: Path, url: str) -> str:
    """Copy an exported folder there; returns the URL. The mark goes last: an export without one is not whole. Of an earlier export only
    what its mark names is replaced or deleted.

    Raises UserError for a place that holds something else, and with what the store said.
    """
    store, root = _store(url)

    def refused(error: Exception) -> UserError:
        return UserError(
            f"Sending to {url} failed: {first_line(error)}",
            fix=f"What was exported is in {folder}: send it again, or by hand.",
        )

    with foreign(refused):  # every store has errors of its own
        _send(folder, store, root, url)
    return url


def _send(folder: Path, store: Any, root: str, url: str) -> None:
    mark, unfinished = f"{root}/{MARK}", f"{root}/{_UNFINISHED}"
    before = {name for path in (mark, unfinished) if store.exists(path) for name in json.loads(store.cat_file(path))}
    there = {path.removeprefix(root).lstrip("/") for path in store.find(root)} if store.exists(root) else set()
    if strange := sorted(there - before - {MARK, _UNFINISHED}):
        raise UserError(f"There is something else at {url}", where=strange[0], fix="Name an empty place with --out.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    store.makedirs(root, exist_ok=True)
    store.pipe_file(unfinished, json.dumps(sorted({*before, *names} - {MARK})).encode())
    if store.exists(mark):
        store.rm_file(mark)
    for name in [name for name in names if name != MARK] + [MARK]:
        target = f"{root}/{name}"
        store.makedirs(target.rpartition("/")[0], exist_ok=True)
        store.put_file(str(folder / name), target)
    for name in sorted((there & before) - set(names)):
        store.rm_file(f"{root}/{name}")
    store.rm_file(unfinished)


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        store, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{scheme}:// cannot be written here: {first_line(error)}",
            where="--out",
            fix="Install what fsspec needs for it: pip install s3fs (s3://) or gcsfs (gs://).",
        ) from error
    root = str(root).rstrip("/")
    if not root.strip("/"):
        raise UserError("This names no place in the store", where=url, fix="Name a folder: s3://bucket/folder.")
    return store, root
