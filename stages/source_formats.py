"""Rows of one file or hub dataset, as dicts. Columns that are not wanted may be left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from schemas.config.sources import Source
from schemas.errors import UserError, first_line

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CSV_BLOCK = 16 << 20  # bytes: also the longest row


def read_jsonl(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield _object(line, path, number)
    except OSError as error:
        raise _unreadable(path, error) from error


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, line, f"byte {error.start + 1} of the line") from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg.removesuffix(' at')} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "nested too deep"
        )
        raise UserError(
            f"broken JSON: {reason}",
            where=where,
            fix="JSONL has one JSON object a line; a JSON array over several lines must be converted."
            if line.lstrip().startswith(b"[")
            else "Repair or remove the line.",
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"the line holds a {type(value).__name__}, not a JSON object",
            where=where,
            fix='JSONL has one object a line, for example {"prompt": "...", "language": "en"}.',
        )
    return value


def read_csv(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Comma-separated with a header line, quotes as in RFC 4180; every value is text."""
    from pyarrow import ArrowInvalid, csv, string

    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
        if not head.strip():
            return
        if head.startswith(_UTF16):
            raise _not_utf8(str(path), head, "the first bytes")
        read = csv.ReadOptions(block_size=_CSV_BLOCK)
        parse = csv.ParseOptions(newlines_in_values=True)
        names = csv.open_csv(path, read, parse).schema.names
        convert = csv.ConvertOptions(column_types={name: string() for name in names}, strings_can_be_null=False)
        for batch in csv.open_csv(path, read, parse, convert):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), b"", "a column name") from error
    except ArrowInvalid as error:
        if "UTF8" in str(error) or "UTF-8" in str(error):
            raise _not_utf8(str(path), b"", str(error)) from error
        raise UserError(
            f"broken CSV: {error}",
            where=str(path),
            fix="Every row needs as many fields as the header; texts with commas, quotes or newlines must be quoted.",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, only the wanted columns (all if a required one is missing: a message lists them)."""
    from pyarrow import ArrowException
    from pyarrow import parquet as pq

    if path.stat().st_size == 0:
        return
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [name for name in dict.fromkeys([*required, *optional]) if name in present]
            columns = wanted if wanted and set(required) <= set(present) else None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read as Parquet: {first_line(error)}",
            where=str(path),
            fix="The file may be truncated or not Parquet: copy or write it again.",
        ) from error


FORMATS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Iterator[dict[str, Any]]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}


def read_hub(source: Source) -> Iterator[dict[str, Any]]:
    """Rows of a Hugging Face dataset, streamed. Datasets that need a script to load are refused."""
    where = source.path + (f", {source.name}" if source.name else "") + f", split {source.split}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading the Hugging Face dataset {source.path} needs the `datasets` package, which is not installed",
            fix='Install it (pip install "congrad-pipeline[cpu]"), or give a local file.',
        ) from error
    try:
        data = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=True
        )
        for batch in data.iter(batch_size=1024):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"there is no file {source.path}, and no such dataset on the Hugging Face hub",
            where=where,
            fix="Check the spelling; a gated or private dataset needs `hf auth login`.",
        ) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise UserError(
            f"the dataset {source.path} needs a script to load, and scripts are not run",
            where=where,
            fix="Many such datasets have a Parquet copy: set the source's `revision: refs/convert/parquet`.",
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the dataset {source.path} cannot be read: {first_line(error)}",
            where=where,
            fix="If you meant a local file, there is none of this name. Otherwise check network, name and split.",
        ) from error


def _not_utf8(where: str, head: bytes, what: str) -> UserError:
    fix = "It looks like UTF-16: save it as UTF-8." if head.startswith(_UTF16) else "Save the file as UTF-8."
    return UserError(f"the text is not UTF-8: {what} cannot be decoded", where=where, fix=fix)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot be read: {error.strerror or error}", where=str(path))
