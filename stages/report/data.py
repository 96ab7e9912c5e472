"""The tables of a run as the report reads them: any of them may be missing, and is then empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from schemas.tables import gradients_schema, schema_of


@dataclass(frozen=True)
class Tables:
    """inputs: "<table>:<round>" ("<table>" for those that all rounds share) -> its Parquet files in order."""

    inputs: Mapping[str, list[Path]]

    def rounds(self) -> list[int]:
        """Rounds that have any table."""
        return sorted({int(key.rsplit(":", 1)[1]) for key, files in self.inputs.items() if ":" in key and files})

    def has(self, table: str, round_: int) -> bool:
        """Whether the table was written in that round."""
        return bool(self.inputs.get(f"{table}:{round_}"))

    def scan(self, table: str, round_: int | None) -> pl.LazyFrame:
        """The table as a lazy frame; no rows, but its columns, if it is not there. round_ None: all rounds share it."""
        files = self.inputs.get(table if round_ is None else f"{table}:{round_}")
        if files:
            return pl.scan_parquet(files, glob=False)
        schema = schema_of(table) or gradients_schema(1)
        empty = pl.from_arrow(schema.empty_table())
        assert isinstance(empty, pl.DataFrame)
        return empty.lazy()

    def read(self, table: str, round_: int | None, columns: Sequence[str]) -> pl.DataFrame:
        """Some columns of the table, in memory."""
        return self.scan(table, round_).select(list(columns)).collect()
