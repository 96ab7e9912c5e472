"""Running a stage outside the pipeline: a context on plain Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import RunConfig
from stages.contract import Account, Context, ModelRef, Rows, Shard

WORDS = [
    "rain",
    "sun",
    "moon",
    "river",
    "stone",
    "light",
    "winter",
    "apple",
    "number",
    "seven",
    "letter",
    "never",
    "always",
    "green",
    "house",
]


@dataclass
class Notes:
    """A Progress that remembers what it was told."""

    notes: list[str] = field(default_factory=list)
    done: int = 0

    def total(self, amount: int, unit: str) -> None:
        self.done = 0

    def advance(self, amount: int = 1, **rates: float) -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.notes.append(message)


def context(folder: Path, config: RunConfig, models: dict[str, ModelRef], **tables: pa.Table | list[Path]) -> Context:
    """A context whose inputs are the given tables (written to `folder`) or files."""
    inputs = {}
    for name, table in tables.items():
        if isinstance(table, pa.Table):
            path = folder / f"{name}.parquet"
            pq.write_table(table, path)
            inputs[name] = [path]
        else:
            inputs[name] = table
    return Context(config=config, round=0, inputs=inputs, models=models, progress=Notes())


def shards(table: pa.Table, size: int) -> Iterator[Shard]:
    """The table cut into shards."""
    for index, start in enumerate(range(0, table.num_rows, size)):
        yield Shard(index, table.slice(start, size))


def collect(stage: Any, ctx: Context) -> tuple[dict[str, pa.Table], Account]:
    """Run a TableStage to its end."""
    rows: dict[str, list[pa.Table]] = {}
    for item in stage.run(ctx):
        if isinstance(item, Rows):
            rows.setdefault(item.table, []).append(item.data)
        else:
            if item.refusal is not None:  # as a worker does
                raise item.refusal
            return {name: pa.concat_tables(parts) for name, parts in rows.items()}, item
    raise AssertionError("no account")
