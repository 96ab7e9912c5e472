"""Files shipped in data/, wherever the package is installed (clone, editable install or wheel)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from schemas.errors import UserError
from schemas.paths import DATA

PREFIX = "package:"
_LONGEST_NAME = 255  # bytes, on every file system we know


def data_path(name: str) -> Path:
    """The shipped file or folder `name`, for example "rubrics/de.yaml" or "package:rubrics/de.yaml".

    It need not exist: ask `is_file()`. Raises UserError for a name that leaves data/.
    """
    relative = PurePosixPath(name.removeprefix(PREFIX))
    impossible = "\0" in name or any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in relative.parts)
    if relative.is_absolute() or ".." in relative.parts or impossible:
        raise UserError(
            f"{name!r} is not a file of the package",
            fix=f"After `{PREFIX}` give a path inside data/, for example {PREFIX}prompts/en.jsonl.",
        )
    return DATA.joinpath(*relative.parts)


def read_data(name: str) -> str:
    """Text of a shipped file. Raises UserError, naming those of its kind, if it does not exist."""
    path = data_path(name)
    if not path.is_file():
        folder = data_path(str(PurePosixPath(name.removeprefix(PREFIX)).parent))
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else ["no such folder"]
        alike = [entry for entry in there if entry.endswith(path.suffix)]  # no schema among the configs
        raise UserError(
            f"the package has no file {name.removeprefix(PREFIX)}", fix=f"There is: {', '.join(alike or there)}."
        )
    return path.read_text(encoding="utf-8")
