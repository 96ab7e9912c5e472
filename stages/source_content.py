"""What a file is, by its first bytes, when it cannot be read as what its name or `format` says. Files that can be read are not looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import UserError
from stages.opened import head_of, is_compressed
from stages.source_columns import WantedColumns, without_boms
from stages.source_csv import DELIMITERS, before_header

_HEAD = 1 << 14  # bytes
_LINES = 20
"""Lines among which a CSV file's header is looked for."""
_BY_MAGIC = {
    b"version https://git-lfs.github.com/spec/": (
        "a pointer of Git LFS, not the data it stands for",
        "Run `git lfs pull` in the repository, or download the file itself.",
    ),
    b"FEA1\0": ("Feather of version 1", "Write it as Parquet, or as Feather of version 2."),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Excel workbook (.xls)", "Save the sheet as CSV in UTF-8."),
    b"\x1f\x8b": ("compressed twice", "Decompress it once."),
}
"""How a file begins -> what it is, and what to do."""
_PAGE = re.compile(rb"<(?:!doctype html|html|head|body|\?xml)\b", re.IGNORECASE)
_MARKED = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_NAMES = {"parquet": "Parquet", "arrow": "Arrow", "jsonl": "JSONL", "json": "JSON", "csv": "CSV"}
_OBJECT, _ARRAY = re.compile(rb'\{\s*"'), re.compile(rb"\[\s*\{")
_WORDS = re.compile(r'"?[\w .-]{1,40}"?')


@contextmanager
def told_apart(path: Path, format: str, wanted: WantedColumns) -> Iterator[None]:
    """An error of a file that is something else than it is read as says so. Raises UserError."""
    try:
        yield
    except UserError as error:
        if (other := mistaken(path, format, wanted)) is not None:
            raise other from error
        raise


def mistaken(path: Path, format: str | None, wanted: WantedColumns) -> UserError | None:
    """The error of a file that is something else than `format`; None: it is not, or what it is is not known. format: None if nothing
    says how to read it."""
    try:
        head = head_of(path, _HEAD)
    except UserError as error:
        return error
    start = without_boms(head).lstrip()
    for magic, (what, fix) in _BY_MAGIC.items():
        if start.startswith(magic):
            return UserError(f"the file is {what}", where=str(path), fix=fix)
    if head[257:262] == b"ustar":
        return UserError("the file is a TAR archive", where=str(path), fix="Unpack it and name the files in it.")
    if _PAGE.match(start) is not None:
        fix = "A log-in or an error may have been saved in place of the data: download the file again."
        return UserError("the file is a page (HTML or XML), not data", where=str(path), fix=fix)
    if head.startswith((b"PAR1", b"ARROW1")) and is_compressed(path):
        fix = "Decompress it: what is in it is compressed already."
        return UserError(
            "Parquet and Arrow files cannot be read where all of the file is compressed", where=str(path), fix=fix
        )
    found = _format_of(head, start)
    if found is None and format == "csv":
        return _late_header(path, head, wanted)
    if found is None and format is not None and _is_delimited(start, wanted):
        found = "csv"
    if found is None or found == format or {found, format} == {"json", "jsonl"}:
        return None
    read_as = f", and it is read as {_NAMES[format]}" if format else ", which its name does not say"
    fix = f"Set the source's `format: {found}`, or rename the file."
    looks = "looks like" if found == "csv" else "is"
    return UserError(f"the file {looks} {_NAMES[found]}{read_as}", where=str(path), fix=fix)


def _format_of(head: bytes, start: bytes) -> str | None:
    for magic, format in _MARKED.items():
        if head.startswith(magic):
            return format
    if (begun := _OBJECT.match(start)) is not None:
        return "json" if b"\n" in begun.group() else "jsonl"
    return "json" if _ARRAY.match(start) is not None else None


def _is_delimited(start: bytes, wanted: WantedColumns) -> bool:
    """Whether a text begins as CSV does: with a line that names a wanted column, or one of names alone and as many cells below."""
    first, second = [*_lines(start)[:2], "", ""][:2]
    if any(_names(first, [column], wanted) for column in (*wanted.required, *wanted.optional)):
        return True
    cells = ([line.split(delimiter) for line in (first, second)] for delimiter in DELIMITERS)
    return any(len(a) == len(b) > 1 and all(map(_WORDS.fullmatch, a)) for a, b in cells)


def _late_header(path: Path, head: bytes, wanted: WantedColumns) -> UserError | None:
    """The error of a CSV file with other lines before its header; None: it has none, or its columns have other names."""
    columns = wanted.required or wanted.optional
    lines = _lines(head[len(before_header(head)[0]) :])
    at = next((number for number, line in enumerate(lines[:_LINES]) if columns and _names(line, columns, wanted)), 0)
    if not at or any(_names(lines[0], [column], wanted) for column in columns):
        return None
    return UserError(
        f"the first line, {lines[0][:60]!r}, is not the header: a later one names the columns, {lines[at][:60]!r}",
        where=str(path),
        fix="Take out the lines before the header.",
    )


def _names(line: str, columns: Sequence[str], wanted: WantedColumns) -> bool:
    """Whether a line of CSV has cells that are all of these names."""
    cells = ({cell.strip(' "') for cell in line.split(mark)} for mark in (*DELIMITERS, wanted.delimiter or ","))
    return any(found.issuperset(columns) for found in cells)


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", "replace").splitlines()
