"""`inspect`: rows of a table in the terminal."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from rich.console import Console
from rich.text import Text

from pipeline.commit import refused_path
from pipeline.console import printable
from pipeline.rundir import RunDir
from pipeline.status import states_of
from schemas.errors import UserError
from schemas.sketches import scan_numbers
from schemas.tables import TABLES
from stages.conditions import collected, fitting


def table_files(folder: Path, table: str, round_: int) -> list[Path]:
    """Committed files of a table (`dropped/TABLE` for dropped rows). Raises UserError naming the tables there are."""
    found = tables_of(folder, round_)
    if table not in found:
        raise UserError(
            f"Round {round_} of this run has no finished table {table!r}",
            where=str(folder),
            fix=f"It has: {', '.join(sorted(found)) or 'none yet'}.",
        )
    return found[table]


def tables_of(folder: Path, round_: int) -> dict[str, list[Path]]:
    """Committed files of every finished table of a round, in order.

    Dropped rows are under `dropped/TABLE`: those of a stage that refused to go on too; no file where none was dropped."""
    found: dict[str, list[Path]] = {}
    for state in states_of(folder):
        step, manifest = state.step, state.manifest
        if step.spec.per_round and step.round != round_:
            continue
        if manifest is None:
            refused = refused_path(RunDir(folder), step.spec, step.round)
            if refused.is_file():
                found[f"dropped/{step.spec.writes[0]}"] = [refused]
            continue
        found[f"dropped/{step.spec.writes[0]}"] = []
        for file in manifest.files:
            if file.table is not None:
                name = f"dropped/{step.spec.writes[0]}" if file.table == "dropped" else file.table
                found.setdefault(name, []).append(folder / file.path)
    return {name: sorted(files) for name, files in found.items()}


def print_rows(folder: Path, table: str, where: str | None, lang: str | None, limit: int, round_: int) -> None:
    """Print rows, one field a line, with long values cut and nothing that could steer the terminal."""
    frame = _scan(table, table_files(folder, table, round_))
    names = frame.collect_schema().names()
    if lang is not None:
        if "language" not in names:
            raise UserError(f"Table {table} has no language column")
        frame = frame.filter(pl.col("language") == lang)
    if where is not None:
        frame = fitting(frame, where, "--where")
    rows = collected(frame.head(limit), "--where")
    total = collected(frame.select(pl.len()), "--where").item()
    console = Console(highlight=False)
    for row in rows.iter_rows(named=True):
        for name, value in row.items():
            console.print(Text.assemble((f"{name:>24}  ", "bold"), _shown(value)), soft_wrap=True)
        console.print()
    console.print(f"{rows.height:,} of {total:,} rows of {table}")
    if table == "gradients" and (off := _cosine_error(folder, round_)) is not None:
        console.print(f"standard error of a cosine between two pairs, from a second sketch seed: {off:.3f}")


def _scan(table: str, files: list[Path]) -> pl.LazyFrame:
    """The table's rows. Dropped rows of an older version lack columns, and where nothing was dropped there is no file."""
    if table == "gradients":
        return scan_numbers(files)
    if not table.startswith("dropped/"):
        return pl.scan_parquet(files, glob=False)
    schema = pl.from_arrow(TABLES["dropped"].schema.empty_table()).schema  # type: ignore[union-attr]
    if not files:
        return pl.LazyFrame(schema=schema)
    return pl.scan_parquet(files, glob=False, schema=schema, missing_columns="insert")


def _cosine_error(folder: Path, round_: int) -> float | None:
    found = [s.manifest.stats for s in states_of(folder) if s.manifest is not None and s.step.round == round_]
    return next((stats["sketch_cosine_error"] for stats in found if "sketch_cosine_error" in stats), None)


def _shown(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]:
        text = "  ".join(f"[{message['role']}] {message['content']}" for message in value)
    elif isinstance(value, list) and len(value) > 16:
        text = f"[{', '.join(str(v) for v in value[:8])}, ... {len(value):,} values]"
    else:
        text = str(value)
    shown = printable(text[:600]).replace("\n", " ⏎ ")
    return shown if len(text) <= 600 else shown + " …"
