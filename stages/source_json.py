"""Rows of JSONL and JSON files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from stages.opened import opened
from stages.source_columns import BOM, UTF16, WantedColumns, invisible, not_utf8, without_boms
from stages.text.forms import is_conversation


def read_jsonl(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.startswith(BOM):
                line = without_boms(line)
            if line.strip():
                yield _object(_decoded(line, f"{path}:{number}"), f"{path}:{number}")


def read_json(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """JSON arrays of objects, one after another, an object that holds one, a table by columns, or JSONL under another name."""
    with opened(path) as file:
        data = without_boms(file.read())
    if data.startswith(UTF16) or not data.strip():
        yield from read_jsonl(path, wanted)
        return
    text = _decoded(data, str(path))
    del data
    if not text.lstrip().startswith("["):
        start = len(text) - len(text.lstrip())
        value, end = _parsed(text, start, f"{path}:{text.count(chr(10), 0, start) + 1}")
        if text[end:].strip():
            del text
            yield from read_jsonl(path, wanted)
        else:
            yield from _of_object(_checked(value, str(path)), wanted, str(path))
        return
    at, number = text.index("["), 0
    while at < len(text):
        if text[at] != "[":
            raise UserError(
                f"broken JSON: there is more after the array, for example {text[at : at + 40]!r}",
                where=f"{path}:{text.count(chr(10), 0, at) + 1}",
                fix="Only further arrays of rows may follow one: repair the file.",
            )
        at = _skip(text, at + 1, str(path), first=True)
        while at < len(text) and text[at] != "]":
            number += 1
            where = f"{path}, element {number}"
            value, at = _parsed(text, at, where)
            yield _checked(value, where, in_array=True)
            at = _skip(text, at, where)
        if at >= len(text):
            raise UserError(
                "broken JSON: the array has no end", where=str(path), fix="The file may be cut off: copy it again."
            )
        at = _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and (text[at].isspace() or text[at] == "\ufeff"):
        at += 1
    return at


def _of_object(value: dict[str, Any], wanted: WantedColumns, path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file that is one object: columns (pandas' default, or lists), rows by their ids, names of columns beside rows
    of cells (pandas' `split`), the only list of objects in it, or one row. Raises UserError for several lists of objects."""
    columns = list(value.values())
    mine = bool(set(value) & {*wanted.required, *wanted.optional})
    if columns and all(isinstance(column, dict) and column for column in columns):
        keys = list(columns[0])
        cells = mine and not any(is_conversation(column) for column in columns)
        if all(list(column) == keys for column in columns) and (cells or all(key.isdecimal() for key in keys)):
            yield from ({name: column[key] for name, column in value.items()} for key in keys)
            return
        if not mine and wanted.required and any(set(wanted.required) <= set(row) for row in columns):
            yield from columns
            return
    if not mine and _is_split(value):
        yield from (dict(zip(map(str, value["columns"]), row, strict=True)) for row in value["data"])
        return
    tables = {n: c for n, c in value.items() if isinstance(c, list) and c and all(isinstance(r, dict) for r in c)}
    if "features" in value and all(isinstance(entry.get("row"), dict) for entry in tables.get("rows", [{}])):
        raise UserError(
            "this is a page of the Hugging Face dataset viewer: 100 rows at most, and long texts cut",
            where=path,
            fix="Give the data set's id as `path`, or save the whole: datasets.load_dataset(ID, split=...).to_json(FILE).",
        )
    if len(tables) > 1 and not mine:
        raise UserError(
            f"the file holds several tables: {', '.join(repr(name)[:80] for name in list(tables)[:20])}",
            where=path,
            fix="Write each into a file of its own.",
        )
    beside = columns and all(isinstance(column, list) and not is_conversation(column) for column in columns)
    if beside and len({len(column) for column in columns}) == 1 and (mine or not tables):
        yield from (dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True))
    elif tables and not mine:
        yield from next(iter(tables.values()))
    else:
        yield value


def _is_split(value: dict[str, Any]) -> bool:
    """Whether names of columns stand beside rows of cells."""
    names, rows = value.get("columns"), value.get("data")
    if not (isinstance(names, list) and isinstance(rows, list) and rows):
        return False
    return all(isinstance(row, list) and len(row) == len(names) for row in rows)


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
            f"{error.msg.removesuffix(' at')} at {f'line {error.lineno}, ' if error.lineno > 1 else ''}column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "nested too deep"
        )
        if isinstance(error, json.JSONDecodeError) and (unseen := invisible(text, error.pos)):
            raise UserError(f"broken JSON: {reason}, where {unseen} stands", where=where, fix=_UNSEEN) from error
        raise UserError(f"broken JSON: {reason}", where=where, fix=_repair(text[at : at + 1])) from error


_UNSEEN = "Take it out; where many NUL bytes end a file, its writing was cut off: write or copy it again."


def _repair(start: str) -> str:
    if start == "[":
        return "JSONL has one JSON object a line; an array over several lines is `format: json` (or a name ending in .json)."
    return "Repair or remove the line; an object over several lines must be put on one."


def _object(text: str, where: str) -> dict[str, Any]:
    start = len(text) - len(text.lstrip())
    value, end = _parsed(text, start, where)
    if rest := text[end:].strip():
        if unseen := invisible(rest, 0):
            raise UserError(f"broken JSON: after the value stands {unseen}", where=where, fix=_UNSEEN)
        raise UserError(
            f"broken JSON: more than one value on the line, at column {end + 1}", where=where, fix=_repair("{")
        )
    return _checked(value, where)


def _checked(value: Any, where: str, in_array: bool = False) -> dict[str, Any]:
    """The row. Raises UserError for what is none; in_array: it is an element of an array already."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and (in_array or not any(isinstance(cell, dict) for cell in value)):
        raise UserError(
            "it holds a list, not a JSON object: rows are lists, without the names of their columns",
            where=where,
            fix='Write rows as objects, {"prompt": "...", "language": "en"}: in pandas `to_json(FILE, orient="records")`, not "values".',
        )
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in value)
    ):
        raise UserError(
            "it holds a list of messages, not a JSON object",
            where=where,
            fix='Every row is an object: put the messages under a name, {"messages": [...]}.',
        )
    array = "" if in_array else "; an array of rows is `format: json` (or a name ending in .json)"
    raise UserError(
        f"it holds a {type(value).__name__}, not a JSON object",
        where=where,
        fix=f'Every row is an object, for example {{"prompt": "...", "language": "en"}}{array}.',
    )


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = "of the line" if where.rpartition(":")[2].isdecimal() else "of the file"
        raise not_utf8(where, data, f"byte {error.start + 1} {place}") from error
