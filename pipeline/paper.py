"""`table`: methods down, seen and unseen languages and benchmark tax across, in the forms that papers print."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from pipeline.existing import config_of, find_run, usable_path
from pipeline.inspect import tables_of
from pipeline.paper_table import BOLD, PaperTable, as_csv, is_above, latex, markdown
from pipeline.trials import UNTRAINED
from schemas.errors import UserError
from stages.compare.seeds import over_seeds
from stages.evaluate.metrics import ALL, WIN_RATES
from stages.report.results import measure_of

Form = Literal["md", "tex", "csv"]
BASE = "base"
TRIALS = "evaluation.parquet"
"""What `compare --train` leaves in its folder."""
_SEEN, _UNSEEN, _BENCHMARK = "test", "unseen", "benchmark"
_GROUPS = {_SEEN: "seen", _UNSEEN: "unseen", _BENCHMARK: "tax"}
_METRICS = ("accuracy", *WIN_RATES, "benchmarks", "benchmarks_change")
_FIGURE = ["split", "language", "metric"]
_COLUMNS = ["method", *_FIGURE, "value", "low", "high", "n"]


@dataclass(frozen=True)
class Papers:
    """figures: method, split, language, metric, value, low, high, n; notes: what a reader must know of them."""

    figures: pl.DataFrame
    notes: list[str]


def gathered(runs: Sequence[str]) -> Papers:
    """What runs, or folders of `compare --train`, measured; `NAME=RUN` gives a method its name, and the methods of a comparison `NAME: `
    before theirs.

    The model before training is one row, `base`, where all runs started from the same figures, and else one for each. Raises UserError for a
    run without an evaluation, and for two methods of one name.
    """
    frames: list[tuple[str, pl.DataFrame]] = []
    bases: list[tuple[str, pl.DataFrame]] = []
    notes = ["Brackets: 95% interval, of a run over its prompts, of a comparison over its seeds."]
    for text in runs:
        name, folder, given = _named(text)
        found = _trials(folder, name if given else None) if (folder / TRIALS).is_file() else _run(folder, name)
        for method, rows in found:
            (bases if method == BASE else frames).append((name if method == BASE else method, rows))
    names = [name for name, _ in frames]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two methods are called {twice!r}", fix="Give one a name of its own: NAME=RUN.")
    own = [rows for _, rows in bases]
    started = [(BASE, _together(own))] if _alike(own) else []
    if not started:
        started = [(f"{BASE} of {name}", rows) for name, rows in bases]
        notes.append("The runs do not start from the same figures: other models, or other prompts and pairs.")
    figures = pl.concat(
        [rows.select(pl.lit(method).alias("method"), *_COLUMNS[1:]) for method, rows in [*started, *frames]]
    )
    return Papers(figures, notes)


def table_of(papers: Papers, by_language: str | None = None) -> PaperTable:
    """The printed table: of all languages of a split, or, with by_language, one metric with a column a language.

    Bold: a method (not base) whose interval lies above that of every other. Raises UserError for a metric that was not measured.
    """
    rows = papers.figures.filter(pl.col("n") > 0)
    columns = _columns(rows, by_language)
    found = {(r["method"], r["split"], r["language"], r["metric"]): r for r in rows.iter_rows(named=True)}
    methods = list(dict.fromkeys(papers.figures["method"]))
    trained = [method for method in methods if not _is_base(method)]
    lines = []
    for method in methods:
        cells = []
        for column in columns:
            mine = found.get((method, *column))
            rivals = [found[other, *column] for other in trained if other != method and (other, *column) in found]
            cells.append((_cell(mine), mine is not None and method in trained and is_above(mine, rivals)))
        lines.append((method, cells))
    return PaperTable([_title(column, by_language) for column in columns], lines)


def written(papers: Papers, form: Form, by_language: str | None = None) -> str:
    """The table in a form; CSV holds every figure, in rows."""
    if form == "csv":
        return as_csv(papers.figures)
    table, notes = (
        table_of(papers, by_language),
        [*papers.notes, *_uneven(papers.figures, by_language), f"{BOLD} method."],
    )
    if form == "tex":
        return latex(table) + "".join(f"% {note}\n" for note in notes)
    return markdown(table) + "\n" + "".join(f"{note}\n" for note in notes)


def form_of(text: str) -> Form:
    """A form by its name. Raises UserError."""
    for form in get_args(Form):
        if text == form:
            return form
    raise UserError(f"There is no form {text!r}", where="--form", fix=f"There are {', '.join(get_args(Form))}.")


def _named(text: str) -> tuple[str, Path, bool]:
    """Name, folder, and whether the name was given. A folder may have `=` in its name: a name is what stands before one where there is no
    such folder."""
    name, equals, rest = text.partition("=")
    if equals and name and not Path(text).exists():
        return name, _folder(rest), True
    folder = _folder(text)
    return folder.resolve().name, folder, False


def _folder(text: str) -> Path:
    """Of a comparison or a run, by its path or its name under runs/."""
    given = usable_path(Path(text))
    for folder in (given, Path("runs") / given):
        if os.path.isfile(folder / TRIALS):
            return folder
        if os.path.isfile(folder / "run.yaml"):
            break
    try:
        return find_run(given)
    except UserError as error:
        fix = f"{error.fix} Or a folder of compare --train (it holds {TRIALS}), by its path or name too."
        raise UserError(error.what, where=text, fix=fix) from None


def _run(folder: Path, name: str) -> list[tuple[str, pl.DataFrame]]:
    """Of the run's last round that is evaluated."""
    for round_ in reversed(range(config_of(folder).rounds)):
        if files := tables_of(folder, round_).get("evaluation"):
            rows = pl.read_parquet(files, glob=False).select("model", *_COLUMNS[1:])
            before, after = pl.col("model") == "before", pl.col("model").is_in(["after", "after vs before"])
            return [(BASE, rows.filter(before)), (name, rows.filter(after))]
    raise UserError("This run has no evaluation", where=str(folder), fix="Run it to its end: congrad run CONFIG.")


def _trials(folder: Path, name: str | None) -> list[tuple[str, pl.DataFrame]]:
    """Of every selection, means over its seeds. name: of the comparison, if it has one; it stands before the selection's, or for it where
    there is only one."""
    figures = over_seeds(pl.read_parquet(folder / TRIALS)).rename({"mean": "value"})
    arms = list(dict.fromkeys(figures["arm"]))
    selections = [arm for arm in arms if arm != UNTRAINED]
    called = {arm: arm if name is None else name if len(selections) == 1 else f"{name}: {arm}" for arm in selections}
    called[UNTRAINED] = BASE
    return [(called[arm], figures.filter(pl.col("arm") == arm).select(*_COLUMNS[1:])) for arm in arms]


def _alike(bases: Sequence[pl.DataFrame]) -> bool:
    """Whether they have the same figures, wherever two have one."""
    values: dict[tuple[Any, ...], float] = {}
    for rows in bases:
        for *key, value in rows.drop_nulls("value").select(*_FIGURE, "value").iter_rows():
            if abs(values.setdefault(tuple(key), value) - value) > 1e-9:
                return False
    return bool(bases)


def _together(bases: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """All that was measured of one model: each figure of the first that has it."""
    rows = pl.concat([base.select(_COLUMNS[1:]) for base in bases])
    measured_first = rows.sort(pl.col("value").is_null(), maintain_order=True)
    return measured_first.unique(_FIGURE, keep="first", maintain_order=True)


def _uneven(figures: pl.DataFrame, by_language: str | None) -> list[str]:
    """Printed columns whose methods were measured on different numbers of items."""
    notes, rows = [], figures.filter(pl.col("n") > 0)
    for column in _columns(rows, by_language):
        same = [pl.col(name) == value for name, value in zip(_FIGURE, column, strict=True)]
        items = rows.filter(*same)["n"].unique().sort().to_list()
        if len(items) > 1:
            notes.append(
                f"{', '.join(_title(column, by_language))}: methods were measured on different numbers of items"
                f" ({', '.join(map(str, items))}): not to be compared."
            )
    return notes


def _columns(rows: pl.DataFrame, by_language: str | None) -> list[tuple[str, str, str]]:
    return _overall(rows) if by_language is None else _languages(rows, by_language)


def _overall(rows: pl.DataFrame) -> list[tuple[str, str, str]]:
    there = set(rows.select("split", "language", "metric").iter_rows())
    return [key for split in _GROUPS for metric in _METRICS if (key := (split, ALL, metric)) in there]


def _languages(rows: pl.DataFrame, metric: str) -> list[tuple[str, str, str]]:
    mine = rows.filter((pl.col("metric") == metric) & pl.col("split").is_in(list(_GROUPS)))
    if mine.is_empty():
        known = sorted(set(rows["metric"]))
        raise UserError(f"No run measured {metric!r}", where="--by-language", fix=f"There are {', '.join(known)}.")
    found = mine.select("split", "language", "metric").unique().rows()
    order = {split: n for n, split in enumerate(_GROUPS)}
    return sorted(found, key=lambda key: (order[key[0]], key[1] == ALL, key[1]))


def _is_base(method: str) -> bool:
    return method == BASE or method.startswith(f"{BASE} of ")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    span = "" if row["low"] is None or row["high"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.3f}{span}"


def _title(column: tuple[str, str, str], by_language: str | None) -> tuple[str, str]:
    split, language, metric = column
    return _GROUPS[split], language if by_language else measure_of(metric).title
