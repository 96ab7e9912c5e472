"""`inspect`: rows of a table in the terminal."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from rich.text import Text

from pipeline.commit import refused_path
from pipeline.console import Terminal, printable
from pipeline.damage import damage
from pipeline.plan import State, not_current
from pipeline.rundir import RunDir
from pipeline.selection import refuse_round
from pipeline.status import states_of
from schemas.errors import UserError, first_line, foreign
from schemas.manifests import StageManifest
from schemas.sketches import scan_numbers
from schemas.tables import TABLES
from stages.conditions import collected, fitting


def table_files(folder: Path, table: str, round_: int) -> list[Path]:
    """Committed files of a current table (`dropped/TABLE` for dropped rows). Raises UserError naming the tables there are."""
    found = tables_of(folder, round_)
    if table not in found:
        raise UserError(
            f"Round {round_} of this run has no finished table {table!r}",
            where=str(folder),
            fix=f"It has: {', '.join(sorted(found)) or 'none yet'}.",
        )
    return found[table]


def tables_of(folder: Path, round_: int) -> dict[str, list[Path]]:
    """Files of every finished and current table of a round, in order.

    Dropped rows are under `dropped/TABLE`: those of a stage that refused to go on too; no file where none was dropped. Raises UserError for a round
    that the run does not have."""
    found: dict[str, list[Path]] = {}
    states = states_of(folder)
    refuse_round(round_, (state.step.round for state in states), str(folder))
    for state in states:
        spec = state.step.spec
        if not _is_of(state, round_):
            continue
        if state.kind == "done" and state.manifest is not None:
            found |= _tables(folder, state, state.manifest)
        elif (refused := refused_path(RunDir(folder), spec, state.step.round)).is_file():
            found[f"dropped/{spec.writes[0]}"] = [refused]
    return found


def tables_not_current(folder: Path, round_: int) -> dict[str, tuple[list[Path], str]]:
    """Tables that lie where the run's would, and are not current: (files, why)."""
    found: dict[str, tuple[list[Path], str]] = {}
    rundir = RunDir(folder)
    for state in states_of(folder):
        old = rundir.stage(state.step.spec, state.step.round)
        if state.kind in ("changed", "stale") and old is not None and _is_of(state, round_):
            tables = _tables(folder, state, old)
            found |= {name: (paths, not_current(state)) for name, paths in tables.items()}
    return found


def _is_of(state: State, round_: int) -> bool:
    return not state.step.spec.per_round or state.step.round == round_


def _tables(folder: Path, state: State, manifest: StageManifest) -> dict[str, list[Path]]:
    spec = state.step.spec
    dropped = f"dropped/{spec.writes[0]}" if spec.writes else ""
    found: dict[str, list[Path]] = {name: [] for name in (*spec.writes, dropped) if name}
    for file in manifest.files:
        if file.table is not None:
            found[dropped if file.table == "dropped" else file.table].append(folder / file.path)
    return {name: sorted(paths) for name, paths in found.items()}


def scan_table(folder: Path, table: str, round_: int) -> pl.LazyFrame:
    """The rows of a current table, sketches as numbers. Raises UserError naming the tables there are."""
    return _scan(table, table_files(folder, table, round_))


def print_rows(folder: Path, table: str, where: str | None, lang: str | None, limit: int, round_: int) -> None:
    """Print rows, one field a line, with long values cut and nothing that could steer the terminal."""
    console = Terminal()
    try:
        files = table_files(folder, table, round_)
    except UserError:
        others = tables_not_current(folder, round_)
        if table not in others:
            raise
        files, why = others[table]
        console.print(Text(printable(f"Not current: {why}"), style="yellow"))
    with foreign(lambda error: _unreadable(folder, table, files, error)):
        frame = _scan(table, files)
        names = frame.collect_schema().names()
        if lang is not None:
            if "language" not in names:
                raise UserError(f"Table {table} has no language column")
            frame = frame.filter(pl.col("language") == lang)
        if where is not None:
            frame = fitting(frame, where, "--where")
            rows, total = collected(frame.head(limit), "--where"), collected(frame.select(pl.len()), "--where").item()
        else:
            rows, total = frame.head(limit).collect(), frame.select(pl.len()).collect().item()
    for row in rows.iter_rows(named=True):
        for name, value in row.items():
            console.print(Text.assemble((f"{name:>24}  ", "bold"), _shown(value)), soft_wrap=True)
        console.print()
    console.print(f"{rows.height:,} of {total:,} rows of {table}")
    if lang is not None and not total:
        there = _scan(table, files).select(pl.col("language").unique().sort()).collect()["language"].to_list()
        console.print(f"languages there: {', '.join(there) or 'none'}")
    if table == "gradients" and (off := _cosine_error(folder, round_)) is not None:
        console.print(f"standard error of a cosine between two pairs, from a second sketch seed: {off:.3f}")


def _unreadable(folder: Path, table: str, files: list[Path], error: Exception) -> UserError:
    return damage(folder) or UserError(
        f"The table {table} cannot be read: {first_line(error)}", where=str(files[0].parent) if files else ""
    )


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
    found = [s.manifest.stats for s in states_of(folder) if s.kind == "done" and s.manifest and s.step.round == round_]
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
