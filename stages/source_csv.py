"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from stages.opened import head_of, opened
from stages.source_columns import BOM, UTF16, WantedColumns, invisible, not_utf8, refuse_twice

_CELL = 1 << 30  # characters
_BLANK = rb"(?:\xef\xbb\xbf|[ ,\t;|]*(?:\r\n?|\n))*"
_BEFORE = re.compile(_BLANK + rb"(?:sep=(.)(?:\r\n?|\n))?" + _BLANK)
_LINE_END = re.compile(r"\r\n?|\n")
_MARK = BOM.decode()
DELIMITERS = ",\t;|"
_HEAD = 1 << 16


def read_csv(path: Path, wanted: WantedColumns) -> Iterator[dict[str, Any]]:
    """Delimited text with a header line, quotes as in RFC 4180; every value is text. Spaces after all of the header's delimiters
    belong to no cell.

    The delimiter is the one named, else the one of Excel's `sep=` line, else of comma, tab, semicolon and bar the one that
    makes the required columns of the header, else the most columns.
    """
    head = head_of(path, _HEAD)
    if not head.strip():
        return
    if head.startswith(UTF16):
        raise not_utf8(str(path), head, "the first bytes")
    if b"\0" in head[:2]:
        raise not_utf8(str(path), UTF16[0], "the first bytes")
    before, excel = before_header(head)
    head = head[len(before) :]
    lines_before = len(_LINE_END.findall(before.decode()))
    skipped = len(before.removeprefix(BOM).decode())
    delimiter = wanted.delimiter or excel or _delimiter(head, wanted)
    csv.field_size_limit(_CELL)
    number, delimiters, quoted = 0, list[int](), False
    with opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        text.read(skipped)
        spaced = _spaced(head, delimiter)
        lines = _counted(text, delimiter, spaced, delimiters)
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        try:
            names = next(reader, [])
            refuse_twice(str(path), names)
            delimiters.clear()
            for row in reader:
                number = reader.line_num + lines_before
                if not quoted and len(delimiters) > 1 and {*delimiters} == {len(names) - 1} != {0}:
                    quoted = _quotes(path, delimiter, spaced, skipped, len(names) - 1)
                    if not quoted:
                        raise UserError(
                            f"a quote makes one row of {len(delimiters)} lines, and every line of the file has {len(names)} fields",
                            where=f"{path}:{number}",
                            fix='The file is written without quoting: write it as JSONL or Parquet, or put texts with quotes into quotes and each quote twice ("").',
                        )
                delimiters.clear()
                if row == names or (row and row[0].startswith(_MARK) and _joined(row, names)):
                    raise UserError(
                        "the header is there a second time",
                        where=f"{path}:{number}",
                        fix="Files were joined with their headers: take the line out, or name the files by a glob.",
                    )
                if len(row) == len(names):
                    yield dict(zip(names, row, strict=True))
                elif row:
                    unseen = f"; the row begins with {name}" if (name := invisible(row[0], 0)) else ""
                    raise UserError(
                        f"broken CSV: {len(row)} fields, and the header has {len(names)}{unseen}",
                        where=f"{path}:{number}",
                        fix="Every row needs as many fields as the header; texts with delimiters, quotes or newlines must be quoted.",
                    )
        except UnicodeDecodeError as error:
            raise not_utf8(
                str(path), b"", f"what follows line {number}" if number else "a column name or the first rows"
            ) from error
        except csv.Error as error:
            raise UserError(
                f"broken CSV: {error}",
                where=f"{path}:{reader.line_num + lines_before}",
                fix='A quote inside a quoted text is written twice (""), not as \\"; every quoted text ends in a quote.',
            ) from error


def before_header(head: bytes) -> tuple[bytes, str | None]:
    """(what comes before the header, the delimiter that it names): byte order marks, lines without a text, Excel's `sep=` line."""
    found = _BEFORE.match(head)
    assert found is not None, "it matches nothing, too"
    return found.group(), found.group(1).decode("latin-1") if found.group(1) else None


def _joined(row: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a row is the header after the byte order mark of a file that was joined to another."""
    return [row[0].lstrip(_MARK).strip('"'), *row[1:]] == names


def _counted(lines: Iterable[str], delimiter: str, spaced: bool, counts: list[int]) -> Iterator[str]:
    """The lines; `counts` grows by the delimiters of each that is not empty: by -1 where a comma is followed by a space, as in
    a quoted text, and not all of the header's are (`spaced`)."""
    prose = f"{delimiter} " if delimiter != "\t" and not spaced else None
    for line in lines:
        if line.strip("\r\n"):
            counts.append(-1 if prose and prose in line else line.count(delimiter))
        yield line


def _quotes(path: Path, delimiter: str, spaced: bool, skipped: int, between: int) -> bool:
    """Whether the file quotes what holds delimiters or line breaks: its header is quoted, or not every line has the delimiters of a row."""
    counts: list[int] = []
    with opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        text.read(skipped)
        lines = _counted(text, delimiter, spaced, counts)
        return '"' in next(lines, "") or any(counts.pop() != between for _ in lines if counts)


def _spaced(head: bytes, delimiter: str) -> bool:
    """Whether a space follows every delimiter of the header, so that it belongs to no cell."""
    names = next(iter(csv.reader(_lines(head), delimiter=delimiter)), [])
    return len(names) > 1 and all(name.startswith(" ") for name in names[1:])


def _lines(head: bytes) -> list[str]:
    return head.decode("utf-8", "replace").splitlines(keepends=True)


def _delimiter(head: bytes, wanted: WantedColumns) -> str:
    """The delimiter of the header line."""
    lines = _lines(head)
    best, rank = ",", (-1, -1)
    for candidate in DELIMITERS:
        try:
            names = next(iter(csv.reader(lines, delimiter=candidate)), [])
        except csv.Error:
            continue
        found = (sum(name in names for name in wanted.required), len(names))
        if found > rank:
            best, rank = candidate, found
    return best
