"""One Parquet row per (table, method, seed), committed as it finishes; and tables of them in which what is not there says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.ids import content_id

MISSING = "missing"
_SCHEMA = pa.schema(
    [
        ("table", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("identity", pa.string()),
        ("seconds", pa.float64()),
        ("values", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
    ]
)


@dataclass(frozen=True)
class Cell:
    """Which figure. identity: everything it depends on but the code; a row made with another one does not count."""

    table: str
    method: str
    seed: int
    identity: str


class Results:
    """The rows in a folder, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, cell: Cell, values: Mapping[str, float], seconds: float) -> None:
        """Commit a row: the file appears under its name when it is whole and on disk."""
        path = self._path(cell)
        row = {
            **vars(cell),
            "seconds": seconds,
            "values": [{"name": name, "value": float(value)} for name, value in sorted(values.items())],
        }
        temporary = path.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist([row], schema=_SCHEMA), temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.rename(path)

    def read(self, cell: Cell) -> dict[str, float] | None:
        """The row's values; None if it is missing or was made with other settings."""
        path = self._path(cell)
        if not path.is_file():
            return None
        row = pq.read_table(path).to_pylist()[0]
        return {entry["name"]: entry["value"] for entry in row["values"]} if row["identity"] == cell.identity else None

    def frame(self) -> pl.DataFrame:
        """All rows: table, method, seed, identity, seconds, name, value."""
        files = sorted(self.folder.glob("*.parquet"))
        if not files:
            return pl.DataFrame(schema={"table": pl.String, "method": pl.String, "seed": pl.Int64})
        return pl.read_parquet(files).explode("values").unnest("values")

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.table}-{content_id(cell.method)[:12]}-{cell.seed}.parquet"


Values = dict[str, float]
Column = Callable[[Values], float]


def figures(found: Sequence[Values | None], column: Column) -> list[float]:
    """A column's value for every seed that has a row; NaN where the column does not apply to the method."""
    return [column(values) for values in found if values is not None]


def shown(found: Sequence[Values | None], column: Column, digits: int = 3) -> str:
    """Mean over the seeds there are, with the lowest and the highest; `missing` if there is none; a dash where the column does not
    apply."""
    there = figures(found, column)
    if not there:
        return MISSING
    if any(value != value for value in there):
        return "–"
    mean = sum(there) / len(there)
    return f"{mean:.{digits}f}" + (f" ({min(there):.{digits}f}..{max(there):.{digits}f})" if len(there) > 1 else "")


def markdown(rows: Mapping[str, Sequence[Values | None]], columns: Mapping[str, Column]) -> str:
    """A table, a line a method; how many of the seeds it has in the second column."""
    lines = ["| | seeds | " + " | ".join(columns) + " |", "| --- | ---: |" + " ---: |" * len(columns)]
    for name, found in rows.items():
        seeds = f"{sum(values is not None for values in found)} of {len(found)}"
        lines.append(f"| {name} | {seeds} | " + " | ".join(shown(found, column) for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"
