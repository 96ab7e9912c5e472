"""Rows of one local file, as dicts. Columns that are not wanted may be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from schemas.errors import UserError, first_line
from stages.opened import opened
from stages.source_columns import WantedColumns, refuse_twice
from stages.source_csv import read_csv
from stages.source_json import read_json, read_jsonl


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
    """A record batch as dicts; dates, times and the like as Arrow writes them, for Python cannot hold them all; 0.1 in single precision is 0.1."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = column.type
        if pa.types.is_temporal(kind) or pa.types.is_interval(kind):
            column = pc.cast(column.cast(pa.int64()) if pa.types.is_duration(kind) else column, pa.string())
        elif pa.types.is_float32(kind):
            column = pc.cast(pc.cast(column, pa.string()), pa.float64())
        try:
            cells = column.to_pylist()
            columns.append([_without_maps(cell, kind) for cell in cells] if _has_maps(kind) else cells)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"column {name!r} holds values that cannot be read: {first_line(error)}",
                where=str(path),
                fix="Take the column out of the file, or write it as text.",
            ) from error
    return (
        [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)] if columns else []
    )


def _has_maps(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_map(kind) or any(_has_maps(kind.field(n).type) for n in range(kind.num_fields))


def _without_maps(cell: Any, kind: Any) -> Any:
    """A cell with its maps as dicts: Arrow gives lists of (key, value)."""
    import pyarrow as pa

    if cell is None:
        return None
    if pa.types.is_map(kind):
        return {key: _without_maps(value, kind.item_type) for key, value in cell}
    if isinstance(cell, dict):
        return {field.name: _without_maps(cell[field.name], field.type) for field in kind}
    return [_without_maps(inner, kind.value_type) for inner in cell] if isinstance(cell, list) else cell


FORMATS: dict[str, Callable[[Path, WantedColumns], Iterator[dict[str, Any]]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
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
