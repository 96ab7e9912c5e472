"""Reading manifests: whole or not at all, and hundreds of thousands of them in seconds."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from schemas import files
from schemas.errors import UserError
from schemas.manifests import MANIFEST_VERSION

M = TypeVar("M", bound=BaseModel)
_DELETE = "Delete the file: what it describes is then made again."
_OTHER_VERSION = "It was written by another version of the pipeline: use that version, or another --run-dir."


def load(path: str | Path, model: type[M], *, torn_is_none: bool = False) -> M | None:
    """The manifest; None if there is none, or if it is torn (no JSON) and what it describes is simply made again.

    Raises UserError on a manifest of another version or with other fields.
    """
    try:
        raw = files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise UserError(
            "This manifest may not be read",
            where=str(path),
            fix="Change its owner or permissions. The same command then continues.",
        ) from None
    try:
        return _of_this_version(path, model.model_validate_json(raw))
    except ValidationError as error:
        try:
            value = json.loads(raw)
        except ValueError:
            if torn_is_none:
                return None
            value = {}
        version = value.get("version", MANIFEST_VERSION) if isinstance(value, dict) else MANIFEST_VERSION
        fix = _OTHER_VERSION if version != MANIFEST_VERSION else _DELETE
        raise UserError("This manifest cannot be read", where=str(path), fix=fix) from error


def _of_this_version(path: str | Path, manifest: M) -> M:
    if getattr(manifest, "version", MANIFEST_VERSION) != MANIFEST_VERSION:
        raise UserError("This manifest cannot be read", where=str(path), fix=_OTHER_VERSION)
    return manifest


class Reader:
    """Reads a file again only when it is another one: with thousands of parts, plans and manifests of stages are large."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, type[BaseModel]], tuple[tuple[int, int, int], BaseModel | None]] = {}

    def load(self, path: Path, model: type[M], *, torn_is_none: bool = False) -> M | None:
        """See `load`."""
        try:
            there = os.stat(path)
        except OSError:
            return load(path, model, torn_is_none=torn_is_none)
        key, now = (str(path), model), (there.st_ino, there.st_mtime_ns, there.st_size)
        if key not in self._read or self._read[key][0] != now:
            with uncollected():
                self._read[key] = now, load(path, model, torn_is_none=torn_is_none)
        found: M | None = self._read[key][1]  # type: ignore[assignment]
        return found


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector: it would go over hundreds of thousands of records again and again, which stay and hold no cycles (a
    fifth of the time)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
