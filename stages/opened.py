"""Files opened for reading whatever they are compressed with, which their first bytes say, not their names."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from schemas.errors import UserError, first_line

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18(.{4})", re.DOTALL)
"""A frame that says nothing of the content, before those of zstd (pzstd) or lz4: its mark and its length."""
_ARCHIVES = {b"PK\x03\x04": "ZIP", b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!": "RAR"}
COMPRESSIONS = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4")


def head_of(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file's content, decompressed."""
    with opened(path) as file:
        return file.read(size)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed (gzip, zstd, bzip2, xz, lz4).

    Raises UserError for a file that cannot be read, an archive, or damaged compressed data, wherever it is noticed.
    """
    try:
        with _stream(path) as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        damaged = not (isinstance(error, OSError) and error.errno)
        fix = "The file is cut off or damaged: download or copy it again." if damaged else ""
        raise UserError(f"cannot be read: {reason}", where=str(path), fix=fix) from error


def is_compressed(path: Path) -> bool:
    """Whether all of a file is compressed. Raises UserError for an archive."""
    return _compression(path) is not None


def _compression(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(8)
        while (frame := _SKIPPED.match(start)) is not None:
            file.seek(int.from_bytes(frame.group(1), "little"), 1)
            start = file.read(8)
    for magic, name in _ARCHIVES.items():
        if start.startswith(magic):
            raise UserError(
                f"the file is a {name} archive",
                where=str(path),
                fix="Unpack it and name the files in it; save a spreadsheet as CSV.",
            )
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def _stream(path: Path) -> Any:
    kind = _compression(path)
    if kind == "gzip":
        return gzip.open(path, "rb")
    if kind == "bz2":
        return bz2.open(path, "rb")
    if kind == "xz":
        return lzma.open(path, "rb")
    if kind is not None:
        import io

        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression=kind), 1 << 20)
    return path.open("rb")
