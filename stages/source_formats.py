"""Rows of one local file, as dicts. Columns that are not wanted may be left out."""

from __future__ import annotations

import csv as text_csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import UserError, first_line
from stages.opened import head_of, opened

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CSV_BLOCK = 16 << 20  # bytes: also the longest row
_DELIMITERS = ",\t;|"
_HEAD = 1 << 16


@dataclass(frozen=True)
class WantedColumns:
    """What is looked for in a file: columns it must have, columns it may have, and a CSV file's delimiter (None: found out).

    structured: columns whose texts are JSON.
    """

    required: Sequence[str]
    optional: Sequence[str] = ()
    delimiter: str | None = None
    structured: Sequence[str] = ()

    def of(self, present: Sequence[str]) -> list[str] | None:
        """The columns to read; None: all, because a required one is missing and the message lists them."""
        found = [name for name in dict.fromkeys([*self.required, *self.optional]) if name in present]
        return found if found and set(self.required) <= set(present) else None


def read_jsonl(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _object(_decoded(line, f"{path}:{number}"), f"{path}:{number}")


def read_json_array(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """A JSON array of objects, or JSONL under another name."""
    with opened(path) as file:
        data = file.read().removeprefix(_BOM)
    if not data.lstrip().startswith(b"["):
        del data
        yield from read_jsonl(path, wanted)
        return
    text = _decoded(data, str(path))
    del data
    at = _skip(text, text.index("[") + 1, str(path), first=True)
    number = 0
    while at < len(text) and text[at] != "]":
        number += 1
        where = f"{path}, element {number}"
        value, at = _parsed(text, at, where)
        yield _checked(value, where)
        at = _skip(text, at, where)
    if at >= len(text):
        raise UserError(
            "broken JSON: the array has no end", where=str(path), fix="The file may be cut off: copy it again."
        )


def _skip(text: str, at: int, where: str, first: bool = False) -> int:
    """The start of the next element of an array, or its end."""
    comma = first
    while at < len(text) and (text[at].isspace() or (text[at] == "," and not comma)):
        comma = comma or text[at] == ","
        at += 1
    if at < len(text) and text[at] != "]" and not comma:
        raise UserError("broken JSON: there is no comma between two elements", where=where, fix="Repair the file.")
    return at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Twice(name)
    return found


class _Twice(Exception):
    """A key that an object has twice."""


def _whole(digits: str) -> int | str:
    """An integer; one of more digits than Python reads (4,300) stays a text."""
    return int(digits) if len(digits) < 4000 else digits


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LONG_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole)


def _parsed(text: str, at: int, where: str) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends."""
    try:
        try:
            return _DECODER.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of thousands of digits
            return _LONG_DECODER.raw_decode(text, at)
    except _Twice as error:
        raise UserError(
            f"the key {str(error)[:80]!r} is there twice in one object", where=where, fix="Keep one of them."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg.removesuffix(' at')} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "nested too deep"
        )
        raise UserError(f"broken JSON: {reason}", where=where, fix=_repair(text[at : at + 1])) from error


def _repair(start: str) -> str:
    if start == "[":
        return "JSONL has one JSON object a line; an array over several lines is `format: json` (or a name ending in .json)."
    return "Repair or remove the line; an object over several lines must be put on one."


def _object(text: str, where: str) -> dict[str, Any]:
    start = len(text) - len(text.lstrip())
    value, end = _parsed(text, start, where)
    if text[end:].strip():
        raise UserError(
            f"broken JSON: more than one value on the line, at column {end + 1}", where=where, fix=_repair("{")
        )
    return _checked(value, where)


def _checked(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"it holds a {type(value).__name__}, not a JSON object",
            where=where,
            fix='Every row is an object, for example {"prompt": "...", "language": "en"}.',
        )
    return value


def read_csv(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """Delimited text with a header line, quotes as in RFC 4180; every value is text.

    The delimiter is the one named, else of comma, tab, semicolon and bar the one that makes the required columns of the
    header, else the most columns.
    """
    from pyarrow import ArrowInvalid, csv, string

    head = head_of(path, _HEAD)
    if not head.strip():
        return
    if head.startswith(_UTF16):
        raise _not_utf8(str(path), head, "the first bytes")
    names, delimiter = _header(head, wanted)
    refuse_twice(str(path), names)
    try:
        read = csv.ReadOptions(block_size=_CSV_BLOCK)
        parse = csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
        with opened(path) as file:
            names = csv.open_csv(file, read, parse).schema.names
        refuse_twice(str(path), names)
        convert = csv.ConvertOptions(column_types={name: string() for name in names}, strings_can_be_null=False)
        with opened(path) as file:
            for batch in csv.open_csv(file, read, parse, convert):
                yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), b"", "a column name") from error
    except ArrowInvalid as error:
        if "UTF8" in str(error) or "UTF-8" in str(error):
            raise _not_utf8(str(path), b"", str(error)) from error
        raise UserError(
            f"broken CSV: {error}",
            where=str(path),
            fix="Every row needs as many fields as the header; texts with delimiters, quotes or newlines must be quoted.",
        ) from error


def _header(head: bytes, wanted: WantedColumns) -> tuple[list[str], str]:
    """(column names, delimiter)"""
    lines = head.removeprefix(_BOM).decode("utf-8", "replace").splitlines(keepends=True)
    best: tuple[tuple[int, int], list[str], str] | None = None
    for candidate in wanted.delimiter or _DELIMITERS:
        try:
            names = next(iter(text_csv.reader(lines, delimiter=candidate)), [])
        except text_csv.Error:
            continue
        rank = (sum(name in names for name in wanted.required), len(names))
        if best is None or rank > best[0]:
            best = rank, names, candidate
    return (best[1], best[2]) if best else ([], wanted.delimiter or ",")


def read_parquet(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, only the wanted columns."""
    from pyarrow import ArrowException
    from pyarrow import parquet as pq

    if path.stat().st_size == 0:
        return
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            refuse_twice(str(path), names)
            for batch in file.iter_batches(batch_size=1024, columns=wanted.of(names)):
                yield from _rows(batch, path)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read as Parquet: {first_line(error)}",
            where=str(path),
            fix="The file may be truncated or not Parquet: copy or write it again.",
        ) from error


def read_arrow(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow IPC file (Feather) or stream (as `datasets` saves them)."""
    import pyarrow as pa

    try:
        with opened(path) as file:
            start = file.read(6)
        if not start:
            return
        with pa.OSFile(str(path)) if start == b"ARROW1" else opened(path) as source:
            reader: Any = pa.ipc.open_file(source) if start == b"ARROW1" else pa.ipc.open_stream(source)
            refuse_twice(str(path), reader.schema.names)
            count = reader.num_record_batches if start == b"ARROW1" else None
            batches = reader if count is None else (reader.get_batch(n) for n in range(count))
            columns = wanted.of(reader.schema.names)
            for batch in batches:
                yield from _rows(batch if columns is None else batch.select(columns), path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read as Arrow: {first_line(error)}",
            where=str(path),
            fix="The file may be truncated or not Arrow: copy or write it again.",
        ) from error


def _rows(batch: Any, path: Path) -> list[dict[str, Any]]:
    """A record batch as dicts; dates, times and the like as Arrow writes them, for Python cannot hold them all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = column.type
        if pa.types.is_temporal(kind) or pa.types.is_interval(kind):
            column = pc.cast(column.cast(pa.int64()) if pa.types.is_duration(kind) else column, pa.string())
        try:
            columns.append(column.to_pylist())
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"column {name!r} holds values that cannot be read: {first_line(error)}",
                where=str(path),
                fix="Take the column out of the file, or write it as text.",
            ) from error
    return (
        [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)] if columns else []
    )


def refuse_twice(where: str, names: Sequence[str]) -> None:
    """Raise UserError for a column name that is there more than once: nobody could say which is meant."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"the column {twice[0][:80]!r} is there {Counter(names)[twice[0]]} times",
            where=where,
            fix="Rename or remove all but one of them.",
        )


FORMATS: dict[str, Callable[[Path, WantedColumns], Iterator[dict[str, Any]]]] = {
    "jsonl": read_jsonl,
    "json": read_json_array,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
ENDINGS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
}


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = "of the line" if where.rpartition(":")[2].isdecimal() else "of the file"
        raise _not_utf8(where, data, f"byte {error.start + 1} {place}") from error


def _not_utf8(where: str, head: bytes, what: str) -> UserError:
    fix = "It looks like UTF-16: save it as UTF-8." if head.startswith(_UTF16) else "Save the file as UTF-8."
    return UserError(f"the text is not UTF-8: {what} cannot be decoded", where=where, fix=fix)
