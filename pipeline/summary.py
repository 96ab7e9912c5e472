"""What a run ends with: rows by stage and language, the conflict between languages, accuracy before and after."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from pipeline.account import totals
from pipeline.console import Terminal, printable
from pipeline.inspect import table_files, tables_of
from pipeline.rundir import RunDir
from pipeline.status import states_of
from pipeline.widths import in_parts, width_of
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import StageManifest, Tally
from stages.catalog import BY_NAME


def print_summary(config: RunConfig) -> None:
    """Print the summary of the last round that got that far."""
    folder = config.folder
    console = Terminal()
    manifests = [state.manifest for state in states_of(folder) if state.kind == "done" and state.manifest]
    console.print("\nRows kept, of how many, by stage and language", style="italic")
    for part in _rows(manifests, console.width):
        console.print(part, end="\n\n")
    for manifest in manifests:
        for line in _reasons(manifest):
            console.print(Text(printable(line), style="dim"), soft_wrap=not console.is_terminal)
    last = max((m.round for m in manifests), default=0)
    for title, make in (
        ("Cosine between the languages' gradient directions (negative: they conflict)", _conflict),
        ("Preference accuracy (higher mean log-probability on chosen), 95% interval", _accuracy),
    ):
        for number, table in enumerate(make(folder, last, console.width)):
            console.print("" if number else f"\n{title}", style="italic")
            console.print(table)
    for line in _known_errors(folder, last, manifests):
        console.print(Text(printable(line), style="bold"), soft_wrap=not console.is_terminal)
    console.print()
    if config.banner:
        console.print(Text(printable(config.banner), style="bold"), soft_wrap=True)
    console.print(Text(printable(_next(folder, manifests))), soft_wrap=True)


def _rows(manifests: list[StageManifest], width: int) -> list[Table]:
    """Rows kept, of how many: a line per language, a column per stage and unit; as many tables as `width` asks for."""
    languages = sorted({t.language for m in manifests for t in m.tallies})
    first = ["", *languages, "all"]
    columns = []
    for manifest in manifests:
        for row in totals(manifest.tallies):
            title = f"{manifest.stage} {manifest.round}" if manifest.round else manifest.stage
            found = [_tally(manifest, row["unit"], language) for language in languages]
            cells = [_kept_of(t.kept, t.rows_in) if t else "" for t in found]
            columns.append([f"{title}\n{row['unit']}s", *cells, _kept_of(row["kept"], row["in"])])
    return [_table([first, *part]) for part in in_parts(columns, width - width_of(first), 2)]


def _table(columns: list[list[str]]) -> Table:
    """Columns of a header and its cells; the last row is their sum."""
    table = _headed(columns)
    *rows, last = zip(*(column[1:] for column in columns), strict=True)
    for cells in rows:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    table.add_row(*(Text(printable(cell)) for cell in last), style="bold")
    return table


def _headed(columns: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column[0], justify="right" if number else "left", no_wrap=True)
    return table


def _tally(manifest: StageManifest, unit: str, language: str) -> Tally | None:
    return next((t for t in manifest.tallies if (t.unit, t.language) == (unit, language)), None)


def _kept_of(kept: int, rows_in: int) -> str:
    return f"{kept:,}" if kept == rows_in else f"{kept:,}/{rows_in:,}"


def _reasons(manifest: StageManifest) -> list[str]:
    """`pairs dropped tie: 12 (ar 1, de 2, ...)` for every reason."""
    lines = []
    units: dict[str, set[str]] = {}
    for tally in manifest.tallies:
        for reason in tally.dropped:
            units.setdefault(reason, set()).add(tally.unit)
    for reason, unit in dict.fromkeys((r, t.unit) for t in manifest.tallies for r in t.dropped):
        where = {t.language: t.dropped[reason] for t in manifest.tallies if t.unit == unit and t.dropped.get(reason)}
        count = sum(where.values())
        spread = ", ".join(f"{language} {n}" for language, n in sorted(where.items()))
        of = f" {unit}s" if len(units[reason]) > 1 else ""
        lines.append(f"  {manifest.stage} dropped {reason}: {count:,}{of} ({spread})")
    for unit in dict.fromkeys(t.unit for t in manifest.tallies):
        where = {t.language: t.failed for t in manifest.tallies if t.unit == unit and t.failed}
        if where:
            spread = ", ".join(f"{language} {n}" for language, n in sorted(where.items()))
            lines.append(f"  {manifest.stage} failed: {sum(where.values()):,} {unit}s ({spread}); errors, see `status`")
    return lines


def _conflict(folder: Path, round_: int, width: int) -> list[Table]:
    """The matrix, a line per language; as many tables as `width` asks for."""
    frame = _read(folder, "gram", round_)
    if frame is None:
        return []
    frame = frame.filter(pl.col("scope") == "model")
    languages = sorted(frame["language"].unique())
    cosines = {(row["language"], row["other"]): row["cosine"] for row in frame.iter_rows(named=True)}
    columns = [[other, *(_cosine(cosines.get((language, other))) for language in languages)] for other in languages]
    first, tables = ["", *languages], []
    for part in in_parts(columns, width - width_of(first), 2):
        table = _headed([first, *part])
        for language, *cells in zip(languages, *(column[1:] for column in part), strict=True):
            table.add_row(language, *(Text(cell, style="bold red" if cell.startswith("-") else "") for cell in cells))
        tables.append(table)
    return tables


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _accuracy(folder: Path, round_: int, width: int) -> list[Table]:
    frame = _read(folder, "evaluation", round_)
    if frame is None:
        return []
    frame = frame.filter((pl.col("metric") == "accuracy") & (pl.col("language") == "all") & (pl.col("n") > 0))
    if frame.is_empty():
        return []
    table = Table(box=None, pad_edge=False)
    for name in ("pairs", "before", "after", "n"):
        table.add_column(name)
    for split in frame["split"].unique(maintain_order=True):
        rows = {row["model"]: row for row in frame.filter(pl.col("split") == split).iter_rows(named=True)}
        cells = [_measured(rows.get(model)) for model in ("before", "after")]
        table.add_row(split, *cells, str(next(iter(rows.values()))["n"]))
    return [table]


def _known_errors(folder: Path, round_: int, manifests: list[StageManifest]) -> list[str]:
    """What became of pairs that the data says are wrong; nothing where it says nothing or nothing is selected."""
    from stages.compare.known_errors import known_errors, sentences

    tables = tables_of(folder, round_)
    if not {"pairs", "curated", "rejected"} <= set(tables):
        return []
    stats = {name: value for m in manifests if m.round == round_ for name, value in m.stats.items()}
    lines = sentences(known_errors(tables["pairs"], tables["curated"], tables["rejected"], stats))
    return ["", *lines] if lines else []


def _measured(row: dict[str, Any] | None) -> str:
    """`0.625 (0.410 to 0.800)`; few items have no interval."""
    if row is None or row["value"] is None:
        return ""
    if row["low"] is None or row["high"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _read(folder: Path, table: str, round_: int) -> pl.DataFrame | None:
    try:
        return pl.read_parquet(table_files(folder, table, round_), glob=False)
    except UserError:
        return None


def _next(folder: Path, manifests: list[StageManifest]) -> str:
    done = {m.stage for m in manifests}
    run = shlex.quote(str(folder))
    lines = [f"Look next at: {folder}/report.html"]
    if "select" in done:
        lines.append(f"  rows:    congrad inspect {run} curated --limit 3")
        lines.append(f"  data:    congrad export {run}")
    if trained := [m for m in manifests if m.stage in BY_NAME and BY_NAME[m.stage].trains]:
        last = trained[-1]
        lines.append(f"  model:   {RunDir(folder).artifacts(BY_NAME[last.stage], last.round)}/model")
    return "\n".join(lines)
