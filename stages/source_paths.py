"""From the `path` of a source to the files it names: globs, folders, links, and what is written as no path is here."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from schemas.errors import UserError
from schemas.paths import refuse_undecodable
from stages.data import PREFIX, data_path

PLACEHOLDER = "{language}"

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_OF_THE_HUB = re.compile(r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)datasets/([\w.-]+/[\w.-]+)")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=$|[-_.\d])", re.IGNORECASE)
_SPLITS = {"train": "train", "test": "test"}
"""What files are called by -> their split; all others are dev's."""
_ORDER = ("train", "dev", "test")
_ABOUT = ("dataset_dict.json", "dataset_info.json", "state.json")
"""Files that `datasets` saves beside the data."""


def is_glob(path: str) -> bool:
    """Whether the path stands for every file that it matches."""
    return any(mark in path for mark in "*?[")


def may_be_hub_id(path: str) -> bool:
    """Whether the path could be the id of a Hugging Face dataset."""
    return _HUB_ID.fullmatch(path.replace(PLACEHOLDER, "en")) is not None


def files_named(pattern: str, language: str | None) -> list[tuple[Path, str]]:
    """(path, name as the user wrote it) of the files that a source's path names, `{language}` filled in; [] for a file of the package
    that a language does not have. Raises UserError."""
    name = pattern.replace(PLACEHOLDER, language) if language else pattern
    if name.startswith(PREFIX):
        return _packaged(pattern, name, language)
    path = Path(os.path.expanduser(name))  # os.path: a name that cannot be a path is a file that is not there
    refuse_undecodable(path, "sources")
    if os.path.isfile(path):
        return [(path, name)]
    if os.path.isdir(path):
        example = f"{name.rstrip('/')}/{_example_in(path)}"
        raise UserError(f"{name} is a folder", where="sources", fix=f"Name the files in it, for example {example}.")
    _refuse_broken_link(str(path))
    if is_glob(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        for match in matches:
            _refuse_broken_link(match)
            refuse_undecodable(match, "sources")
        if files := [(Path(match), match) for match in matches if os.path.isfile(match)]:
            return files
        fix = _rewritten(name) or f"Look in {Path.cwd()} or give a full path."
        raise UserError(f"no file matches {name}", where="sources", fix=fix)
    fix = f"Paths are relative to {Path.cwd()}; a Hugging Face dataset needs `format: hub` if its id looks like a file."
    purpose = f" for language {language}" if language else ""
    raise UserError(f"there is no file {name}{purpose}", where="sources", fix=_rewritten(name) or fix)


def refuse_address(path: str) -> None:
    """Raise UserError for an address (https://, s3://, file://, ...): nothing is fetched from one."""
    if _ADDRESS.match(path) is None:
        return
    shown = path.partition("?")[0]  # what follows may be a signature
    fix = "Download the file and name it here."
    if path.lower().startswith("file://"):
        fix = f"Write the path itself: {unquote(path[len('file://') :])}."
    elif (found := _OF_THE_HUB.match(path)) is not None:
        fix = f"Write the id of the dataset, `path: {found.group(1)}`, or download a file of it and name that."
    raise UserError(
        f"{shown} is an address; sources are files or ids of Hugging Face datasets", where="sources", fix=fix
    )


def _rewritten(name: str) -> str:
    """How to write a path that is written as other programs read them; empty: it is not."""
    found = _BRACES.search(name)
    if found is not None and "," in found.group(1):
        return "Braces are not expanded: give a source for each, or a glob with `*`, `?` or `[ab]`."
    if found is not None:
        return f"`{found.group()}` is not filled in: write `{PLACEHOLDER}`, which stands for each language of the run."
    if "\\" not in name:
        return ""
    windows = re.match(r"[A-Za-z]:\\|\\\\", name) is not None
    return (
        "Give the path that the file has here." if windows else f"Write it with slashes: {name.replace(chr(92), '/')}."
    )


def _refuse_broken_link(path: str) -> None:
    """Raise UserError for a link to nothing: what it stood for would be left out."""
    if not os.path.islink(path) or os.path.exists(path):
        return
    raise UserError(
        f"{path} is a link to {os.readlink(path)}, which is not there",
        where="sources",
        fix="Bring back the file it leads to, or remove the link.",
    )


def several_splits(pattern: str, names: Iterable[str], rows_have_splits: bool) -> str | None:
    """What to say of one source whose files are those of several splits, as their names or the folders below the glob's fixed part say;
    None: they are not."""
    parts = Path(os.path.expanduser(pattern)).parts
    fixed = next((number for number, part in enumerate(parts) if is_glob(part)), len(parts))
    found: dict[str, str] = {}
    for name in names:
        split = next(filter(None, map(_split_of, reversed(Path(name).parts[fixed:]))), None)
        if split is not None:
            found.setdefault(split, name)
    if len(found) < 2:
        return None
    kinds = ", ".join(f"{split} ({found[split]})" for split in _ORDER if split in found)
    held_out = " or ".join(f"`split: {split}`" for split in _ORDER[1:] if split in found)
    said = (
        f"no `split` is set, so that rows of all are trained on: give each a source of its own, with {held_out}"
        if rows_have_splits
        else "all are read: name those alone that are meant"
    )
    return f"{pattern} has files that are of several splits by their names, {kinds}, and {said}"


def _split_of(name: str) -> str | None:
    """The split that the name of a file or folder begins with."""
    found = _SPLIT_NAME.match(name)
    return found and _SPLITS.get(found.group(1).lower(), "dev")


def _example_in(folder: Path) -> str:
    """A glob of the files in a folder, or one level down, that can be read: those of train, where there are several splits."""
    with suppress(OSError):
        entries = sorted(islice(folder.iterdir(), 1000))
        below = sorted(
            (entry for entry in entries if entry.is_dir()), key=lambda entry: _split_of(entry.name) != "train"
        )
        for parent in (None, *below[:20]):
            names = sorted(path.name for path in (entries if parent is None else islice(parent.iterdir(), 1000)))
            for ending in (".parquet", ".arrow", ".jsonl", ".csv", ".json"):
                if files := [name for name in names if name.endswith(ending) and name not in _ABOUT]:
                    return f"{f'{parent.name}/' if parent else ''}{_beginning(files)}*{ending}"
    return "*.parquet"


def _beginning(names: Sequence[str]) -> str:
    """How those begin that are of one split, train's if there are any; empty if no others are there."""
    found = {split: name for name in names if (split := _split_of(name)) is not None}
    if len(found) < 2:
        return ""
    begun = _SPLIT_NAME.match(next(found[split] for split in _ORDER if split in found))
    return begun.group(1) if begun else ""


def _packaged(pattern: str, name: str, language: str | None) -> list[tuple[Path, str]]:
    names = [name]
    if language:
        from schemas.languages import base_language

        names.append(pattern.replace(PLACEHOLDER, base_language(language)))
    for candidate in names:
        path = data_path(candidate)
        if path.is_file():
            return [(Path(str(path)), candidate)]
    if language:
        return []
    raise UserError(f"the package has no file {name.removeprefix(PREFIX)}", where="sources")
