"""Reading the data sets a run starts from: local Parquet, JSONL and CSV files, shipped files, Hugging Face datasets.

Everything wrong with a source is a UserError that names the file, and the line or column where there is one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from schemas.config.base import Section
from schemas.config.sources import Source
from schemas.errors import UserError
from stages.data import PREFIX, data_path
from stages.source_formats import FORMATS, read_hub

BATCH_ROWS = 1024
_ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_PLACEHOLDER = "{language}"


@dataclass(frozen=True)
class SourceFile:
    """A local file of a source. name: as the user wrote it (globs and placeholders filled in)."""

    path: Path
    name: str
    format: str
    language: str | None


@dataclass(frozen=True)
class Batch:
    """Rows start, start+1, ... of `source`; language: the source's, for rows without their own."""

    source: str
    start: int
    language: str | None
    rows: list[dict[str, Any]]


def columns_of(fields: Section, optional: Sequence[str]) -> tuple[list[str], list[str]]:
    """(required, optional) column names of a field mapping.

    A field named in `optional` may be absent from the data, unless the user chose a name other than the default.
    """
    required: list[str] = []
    absent_ok: list[str] = []
    for field, info in type(fields).model_fields.items():
        column = getattr(fields, field)
        if column is not None:
            (absent_ok if field in optional and column == info.default else required).append(column)
    return required, absent_ok


def is_hub(source: Source) -> bool:
    """Whether the source is a Hugging Face dataset: format says so, or it looks like an id and is no local path."""
    if source.format != "auto":
        return source.format == "hub"
    path = source.path
    looks_local = path.startswith((PREFIX, "/", "./", "../", "~")) or _ending(path) or _is_glob(path)
    return not looks_local and path.count("/") <= 1 and not os.path.exists(path)


def hub_ids(sources: Iterable[Source], languages: Sequence[str]) -> list[str]:
    """The ids of the Hugging Face datasets among the sources, each once."""
    found: dict[str, None] = {}
    for source in filter(is_hub, sources):
        filled = languages if _PLACEHOLDER in source.path else [""]
        found |= dict.fromkeys(source.path.replace(_PLACEHOLDER, language) for language in filled)
    return list(found)


def local_files(source: Source, languages: Sequence[str]) -> list[SourceFile]:
    """The source's files in reading order; [] for a hub dataset.

    `{language}` in `package:` paths takes the base language's file if the code itself has none (zh for zh-Hans), and
    leaves out languages the package has no file for. Raises UserError for files that do not exist or cannot be of use.
    """
    if is_hub(source):
        return []
    found: list[SourceFile] = []
    for language in languages if _PLACEHOLDER in source.path else [None]:
        for path, name in _paths(source, language):
            found.append(SourceFile(path, name, _format(source, name), language or source.language))
    return found


def read_rows(
    source: Source, languages: Sequence[str], required: Sequence[str] = (), optional: Sequence[str] = ()
) -> Iterator[Batch]:
    """Batches of a source's rows, each row a dict of the required and optional columns (None where absent).

    Files are checked for existence, emptiness and columns when this is called, rows as they are read.
    """
    if is_hub(source):
        filled = languages if any(_PLACEHOLDER in (text or "") for text in _hub_texts(source)) else [None]
        hubs = [(_fill_hub(source, language), language or source.language) for language in filled]
        return _chain_hub(hubs, required, optional)
    files = local_files(source, languages)
    for file in files:
        for _ in islice(_batches(file, source.limit, required, optional), 1):
            pass
    return (batch for file in files for batch in _batches(file, source.limit, required, optional))


def _chain_hub(
    hubs: Sequence[tuple[Source, str | None]], required: Sequence[str], optional: Sequence[str]
) -> Iterator[Batch]:
    for hub, language in hubs:
        rows = read_hub(hub)
        yield from _cut(rows, hub.path, language, hub.limit, required, optional)


def _batches(file: SourceFile, limit: int | None, required: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    rows = FORMATS[file.format](file.path, required, optional)
    yield from _cut(rows, file.name, file.language, limit, required, optional)


def _cut(
    rows: Iterator[dict[str, Any]],
    name: str,
    language: str | None,
    limit: int | None,
    required: Sequence[str],
    optional: Sequence[str],
) -> Iterator[Batch]:
    rows = islice(rows, limit)
    start = 0
    while batch := list(islice(rows, BATCH_ROWS)):
        if start == 0:
            _check_columns(name, batch, required)
        wanted = [*required, *optional]
        yield Batch(name, start, language, [{column: row.get(column) for column in wanted} for row in batch])
        start += len(batch)
    if start == 0:
        raise UserError(f"{name} has no rows", fix="Give a file with data, or take the source out of the config.")


def _check_columns(name: str, rows: Sequence[dict[str, Any]], required: Sequence[str]) -> None:
    """The columns of the first rows together: rows of a JSONL file need not all have every key."""
    present = list(dict.fromkeys(column for row in rows for column in row))
    for column in required:
        if column in present:
            continue
        nearest = get_close_matches(column, present, n=1, cutoff=0.4)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(
            f"there is no column {column!r}; the columns are {', '.join(map(repr, present)) or 'none'}",
            where=name,
            fix=f"{hint}Set the source's `fields` to the names of your columns.",
        )


def _paths(source: Source, language: str | None) -> list[tuple[Path, str]]:
    name = source.path.replace(_PLACEHOLDER, language) if language else source.path
    if name.startswith(PREFIX):
        return _packaged(source.path, name, language)
    path = Path(os.path.expanduser(name))  # os.path: a name that cannot be a path is a file that is not there
    if os.path.isfile(path):
        return [(path, name)]
    if os.path.isdir(path):
        raise UserError(
            f"{name} is a folder",
            where="sources",
            fix=f"Name the files in it, for example {name.rstrip('/')}/*.parquet.",
        )
    if _is_glob(name):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if not matches:
            raise UserError(
                f"no file matches {name}", where="sources", fix=f"Look in {Path.cwd()} or give a full path."
            )
        return [(Path(match), match) for match in matches]
    purpose = f" for language {language}" if language else ""
    raise UserError(
        f"there is no file {name}{purpose}",
        where="sources",
        fix=f"Paths are relative to {Path.cwd()}; a Hugging Face dataset needs `format: hub` if its id looks like a file.",
    )


def _packaged(pattern: str, name: str, language: str | None) -> list[tuple[Path, str]]:
    names = [name]
    if language:
        from stages.text.language import base_language

        names.append(pattern.replace(_PLACEHOLDER, base_language(language)))
    for candidate in names:
        path = data_path(candidate)
        if path.is_file():
            return [(Path(str(path)), candidate)]
    if language:
        return []
    raise UserError(f"the package has no file {name.removeprefix(PREFIX)}", where="sources")


def _format(source: Source, name: str) -> str:
    if source.format != "auto":
        return source.format
    found = _ENDINGS.get(Path(name).suffix.lower())
    if found is None:
        raise UserError(
            f"the format of {name} is not known from its ending",
            where="sources",
            fix="Readable are Parquet, JSONL (one JSON object a line) and CSV: convert it, or set the source's `format`.",
        )
    return found


def _ending(path: str) -> bool:
    return Path(path).suffix.lower() in {*_ENDINGS, ".json", ".txt", ".tsv", ".gz", ".zst", ".arrow"}


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _hub_texts(source: Source) -> list[str | None]:
    return [source.path, source.name, source.split]


def _fill_hub(source: Source, language: str | None) -> Source:
    if language is None:
        return source
    path, name, split = (text and text.replace(_PLACEHOLDER, language) for text in _hub_texts(source))
    return source.model_copy(update={"path": path, "name": name, "split": split})
