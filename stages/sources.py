"""Reading the data sets a run starts from: local files, shipped files, Hugging Face datasets.

Everything wrong with a source is a UserError that names the file, and the line or column where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from schemas.config.base import Section
from schemas.config.evaluation import PromptSetSource
from schemas.config.sources import PairColumns, PairSource, PromptSource, Source
from schemas.errors import UserError
from stages.beside import a_message_a_row, unread_columns
from stages.data import PREFIX
from stages.layout import LOOKED_AT, Layout, missing_column
from stages.opened import COMPRESSIONS, head_of
from stages.source_columns import WantedColumns, respelt
from stages.source_content import mistaken, told_apart
from stages.source_formats import ENDINGS, FORMATS
from stages.source_hub import read_hub
from stages.source_paths import PLACEHOLDER, files_named, is_glob, may_be_hub_id, refuse_address, several_splits
from stages.text.messages import storable

BATCH_ROWS = 1024


@dataclass(frozen=True)
class SourceFile:
    """A local file of a source. name: as the user wrote it (globs and placeholders filled in)."""

    path: Path
    name: str
    format: str
    language: str | None


@dataclass(frozen=True)
class Batch:
    """Rows start, start+1, ... of `source`, counted from 1, their cells made plain (`stages.layout.Layout`).

    language: the source's, for rows without their own. split: the split that all of them belong to, if the source says.
    notes: what was read as what, for people, said here for the first time. columns: those that the source has.
    """

    source: str
    start: int
    language: str | None
    rows: list[dict[str, Any]]
    split: str | None = None
    notes: list[str] = field(default_factory=list)
    columns: Sequence[str] = ()


EXCERPT = 200  # characters


def excerpt(cells: Mapping[str, Any]) -> str:
    """How a row's text begins: its longest cell, conversations as what was said."""
    texts = []
    for cell in cells.values():
        if isinstance(cell, list):
            cell = " ".join(
                str(part.get("content")) if isinstance(part, dict) else str(part)[:EXCERPT] for part in cell[:4]
            )
        if isinstance(cell, str):
            texts.append(storable(cell[:EXCERPT]))
    return max(texts, key=len, default="")


def columns_of(fields: Section, optional: Sequence[str]) -> tuple[list[str], list[str]]:
    """(required, optional) column names of a field mapping.

    A field named in `optional` may be absent from the data, unless the user chose a name other than the default. Fields
    that `fields.no_columns` names are left out.
    """
    required: list[str] = []
    absent_ok: list[str] = []
    for name, info in type(fields).model_fields.items():
        column = getattr(fields, name)
        if column is not None and name not in getattr(fields, "no_columns", ()):
            (absent_ok if name in optional and column == info.default else required).append(column)
    return required, absent_ok


def is_hub(source: Source) -> bool:
    """Whether the source is a Hugging Face dataset: format says so, or it looks like an id and is no local path."""
    if source.format != "auto":
        return source.format == "hub"
    path = source.path
    looks_local = path.startswith((PREFIX, "/", "./", "../", "~")) or _ending(path) or is_glob(path)
    return not looks_local and may_be_hub_id(path) and not os.path.exists(path)


def hub_ids(sources: Iterable[Source], languages: Sequence[str]) -> list[str]:
    """The ids of the Hugging Face datasets among the sources, each once."""
    found: dict[str, None] = {}
    for source in filter(is_hub, sources):
        filled = languages if PLACEHOLDER in source.path else [""]
        found |= dict.fromkeys(source.path.replace(PLACEHOLDER, language) for language in filled)
    return list(found)


def local_files(source: Source, languages: Sequence[str]) -> list[SourceFile]:
    """The source's files in reading order; [] for a hub dataset.

    `{language}` in `package:` paths takes the base language's file if the code itself has none (zh for zh-Hans), and
    leaves out languages the package has no file for. Raises UserError for files that do not exist or cannot be of use.
    """
    refuse_address(source.path)
    if is_hub(source):
        return []
    for key in ("name", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"`{key}` is for Hugging Face datasets, and {source.path} is a local file", where="sources")
    if not source.has_splits and source.split is not None:
        raise UserError(
            f"`split` is for Hugging Face datasets here, and {source.path} is a local file: all its rows are read",
            where="sources",
            fix=f"Leave `split: {source.split}` out, and name a file with the rows that are meant.",
        )
    found: list[SourceFile] = []
    for language in languages if PLACEHOLDER in source.path else [None]:
        for path, name in files_named(source.path, language):
            found.append(SourceFile(path, name, _format(source, path, name), language or source.language))
    return found


def read_rows(
    source: Source,
    languages: Sequence[str],
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    check: Callable[[Batch], None] | None = None,
    structured: Mapping[str, str | None] | None = None,
    lists: Mapping[str, str] | None = None,
    singles: Sequence[str] = (),
    most: int | None = None,
) -> Iterator[Batch]:
    """Batches of a source's rows, each row a dict of the required and optional columns (None where absent).

    Files of a glob that have no rows are left out, unless all are. Files are checked for existence, emptiness and columns when this is called, rows as they are read. A column that some
    files of a source have must be in all of them. check: raises UserError for a file's first batch that is of no use.
    structured, lists, singles: columns whose texts are, or may be, lists (`stages.layout.Layout`). most: local files, at most, that are
    looked at and read; None: all.
    """
    wanted = WantedColumns(required, optional, source.delimiter, structured or {}, lists or {}, singles)
    if is_hub(source):
        filled = languages if any(PLACEHOLDER in (text or "") for text in _hub_texts(source)) else [None]
        hubs = [(_fill_hub(source, language), language or source.language) for language in filled]
        return _chain_hub(hubs, wanted, check)
    there = local_files(source, languages)
    files = there[:most]
    columns: dict[str, Sequence[str]] = {}
    empty: list[str] = []
    for file in files:
        with told_apart(file.path, file.format, wanted):
            first = next(_batches(file, source, wanted), None)
            if first is not None and check is not None:
                check(first)
        if first is None:
            if (other := mistaken(file.path, file.format, wanted)) is not None:  # JSONL of one line is a CSV's header
                raise other
            empty.append(file.name)
        else:
            columns[file.name] = first.columns
    if empty and not (is_glob(source.path) and (columns or len(files) < len(there))):
        raise _no_rows(empty[0])
    if PLACEHOLDER not in source.path:  # a file a language: what one has, its maker may have left out of another
        _same_columns(columns, optional)
    notes = [f"left out, for they have no rows: {', '.join(empty[:5])}{', ...' if empty[5:] else ''}"] if empty else []
    own_splits = source.split or getattr(getattr(source, "fields", None), "split", None)
    if is_glob(source.path) and not own_splits:
        notes += filter(
            None,
            [several_splits(source.path, (file.name for file in there if file.name not in empty), source.has_splits)],
        )
    return _chain(files, source, wanted, notes)


def prompt_batches(
    source: PromptSource | PromptSetSource, codes: Sequence[str], most: int | None = None
) -> Iterator[Batch]:
    """Batches of a data set of prompts. most: as of `read_rows`."""
    required, optional = columns_of(source.fields, ("language", "group_id"))
    return read_rows(source, codes, required, optional, _check_prompts, singles=(source.fields.prompt,), most=most)


def _check_prompts(batch: Batch) -> None:
    """Raise UserError for rows that are messages of conversations: answers, and questions without what was said before."""
    if (said := a_message_a_row(batch.columns)) is not None:
        raise UserError(
            f"{said}: answers would be read as prompts",
            where=batch.source,
            fix="Write a row for each prompt, without the column that says who speaks: the first messages of users, or whole conversations as "
            "lists of messages.",
        )


def _chain(files: Sequence[SourceFile], source: Source, wanted: WantedColumns, notes: list[str]) -> Iterator[Batch]:
    """The batches of the files that have rows; the first one has the notes on all of them."""
    for file in files:
        for batch in _batches(file, source, wanted):
            batch.notes.extend(notes)
            notes.clear()
            yield batch


def _no_rows(name: str) -> UserError:
    return UserError(f"{name} has no rows", fix="Give a file with data, or take the source out of the config.")


def _same_columns(columns: dict[str, Sequence[str]], optional: Sequence[str]) -> None:
    for column in optional:
        without = [name for name, present in columns.items() if column not in present]
        if without and len(without) < len(columns):
            other = next(name for name, present in columns.items() if column in present)
            error = missing_column(without[0], column, columns[without[0]])
            raise UserError(f"{error.what}; {other} has it", where=error.where, fix=error.fix)


def _chain_hub(
    hubs: Sequence[tuple[Source, str | None]], wanted: WantedColumns, check: Callable[[Batch], None] | None
) -> Iterator[Batch]:
    for hub, language in hubs:
        batch = None
        for batch in _cut(read_hub(hub), hub.path, language, hub, wanted):
            if check is not None and batch.start == 1:
                check(batch)
            yield batch
        if batch is None:
            raise _no_rows(hub.path)


def _batches(file: SourceFile, source: Source, wanted: WantedColumns) -> Iterator[Batch]:
    wanted = replace(wanted, present=[])
    rows = FORMATS[file.format](file.path, wanted)
    return _cut(rows, file.name, file.language, source, wanted)


def own_split(source: Source) -> str | None:
    """The split that the source says all its rows are in: what `splits` maps its `split` to, or the `split` given for a local file."""
    named: Mapping[str, str] = getattr(source, "splits", {})
    if is_hub(source):
        return named.get(source.hub_split)
    return None if source.split is None else named.get(source.split, source.split)


def names_splits(source: PromptSource | PairSource) -> bool:
    """Whether rows of the source may be in a split that is not drawn by hash."""
    return bool(source.fields.split or source.splits or own_split(source))


def _cut(
    rows: Iterator[dict[str, Any]], name: str, language: str | None, source: Source, wanted: WantedColumns
) -> Iterator[Batch]:
    rows = islice(rows, source.limit)
    head = list(islice(rows, LOOKED_AT))
    if not head:
        return
    if spelt := respelt((column for row in head for column in row), [*wanted.required, *wanted.optional]):
        head = [{spelt.get(column, column): cell for column, cell in row.items()} for row in head]
        rows = ({spelt.get(column, column): cell for column, cell in row.items()} for row in rows)
    layout = Layout(name, head, wanted.required, wanted.optional, wanted.structured, wanted.lists, wanted.singles)
    present, read = wanted.present or layout.columns, [*wanted.required, *wanted.optional]
    layout.notes.extend(unread_columns(present, read, _unrated_answers(source)))
    split = own_split(source)
    rows, start = chain(head, rows), 1
    del head
    following = next(rows, None)
    while following is not None:
        batch = [following, *islice(rows, BATCH_ROWS - 1)]
        following = next(rows, None)
        plain_rows = [layout.row(row) for row in batch]
        if following is None:
            layout.finish()
        notes, layout.notes = layout.notes, []
        yield Batch(name, start, language, plain_rows, split, notes, layout.columns)
        start += len(batch)


def _unrated_answers(source: Source) -> list[str]:
    """The columns that are read as chosen and rejected, where no scores are read beside them."""
    fields = getattr(source, "fields", None)
    if not isinstance(fields, PairColumns) or fields.completions or getattr(fields, "chosen_score", None):
        return []
    return [fields.chosen, fields.rejected]


def _format(source: Source, path: Path, name: str) -> str:
    if source.format != "auto":
        return source.format
    known = ENDINGS.get(_plain_ending(name)) or _by_content(path)
    if known is None:
        raise mistaken(path, None, WantedColumns(())) or UserError(
            f"the format of {name} is not known from its ending",
            where="sources",
            fix="Readable are Parquet, Arrow, JSONL (one JSON object a line), JSON arrays and CSV or TSV, compressed or not: "
            "convert it, or set the source's `format`.",
        )
    return known


def _by_content(path: Path) -> str | None:
    start = head_of(path, 8)
    return "parquet" if start.startswith(b"PAR1") else "arrow" if start.startswith(b"ARROW1") else None


def _plain_ending(name: str) -> str:
    """The ending of a file name, less what says how it is compressed."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def _ending(path: str) -> bool:
    return Path(path).suffix.lower() in {*ENDINGS, *COMPRESSIONS, ".txt", ".zip"}


def _hub_texts(source: Source) -> list[str | None]:
    return [source.path, source.name, source.hub_split]


def _fill_hub(source: Source, language: str | None) -> Source:
    if language is None:
        return source
    path, name, split = (text and text.replace(PLACEHOLDER, language) for text in _hub_texts(source))
    return source.model_copy(update={"path": path, "name": name, "split": split})
