"""Trained selections as tables: for the terminal, in the forms papers print (Markdown, LaTeX, CSV), and as a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from pipeline.console import Terminal
from pipeline.paper_table import BOLD, PaperTable, as_csv, is_above, latex, markdown
from pipeline.trials import Trials
from schemas.files import write_text
from stages.compare.seeds import over_seeds
from stages.evaluate.metrics import WIN_RATES
from stages.report.results import measure_of

SHOWN = (
    "accuracy",
    "implicit_reward_accuracy",
    *WIN_RATES,
    "answer_language",
    "logp_chosen",
    "benchmarks",
    "benchmarks_change",
)
"""Measures in the printed tables, in this order; evaluation.csv has all."""
_ALL = "all"


def write_tables(trials: Trials) -> list[Path]:
    """Write table.md, table.tex, evaluation.csv and comparison.html into the folder; their paths."""
    from stages.report.trained import page

    figures = over_seeds(trials.rows)
    table = paper_table(figures)
    note = f"Mean over seeds ± half of its 95% interval (Student's t). Trainings of {trials.length}. {BOLD} trained selection."
    texts = {
        "table.md": markdown(table) + f"\n{note}\n",
        "table.tex": latex(table) + f"% {note}\n",
        "evaluation.csv": as_csv(figures),
        "comparison.html": page(figures, trials.folder.name, note),
    }
    for name, text in texts.items():
        write_text(trials.folder / name, text)
    return [trials.folder / name for name in texts]


def print_trials(trials: Trials, paths: list[Path], as_json: bool) -> None:
    """Print the figures for people, a table a split, or all of them as JSON."""
    console = Terminal()
    figures = over_seeds(trials.rows)
    if as_json:
        runs = [{"arm": t.arm.name, "seed": t.seed, "run": str(t.folder)} for t in trials.trials]
        lengths = {"steps": trials.steps, "forgetting_steps": trials.forgetting, "objectives": trials.objectives}
        value: dict[str, Any] = lengths | {"runs": runs, "figures": figures.to_dicts()}
        console.write_json(value)
        return
    table = paper_table(figures)
    for split in dict.fromkeys(split for split, _ in table.columns):
        places = [n for n, (own, _) in enumerate(table.columns) if own == split]
        shown = Table(box=None, pad_edge=False, title=split, title_justify="left", padding=(0, 1, 0, 0))
        shown.add_column("", max_width=24, overflow="ellipsis", no_wrap=True)
        for place in places:
            shown.add_column(table.columns[place][1], justify="right")
        for arm, cells in table.rows:
            shown.add_row(Text(arm), *(Text(cells[n][0], style="bold" if cells[n][1] else "") for n in places))
        console.print(shown)
        console.print()
    console.print(Text("Tables and plots: " + ", ".join(str(path) for path in paths)), soft_wrap=True)


def paper_table(figures: pl.DataFrame) -> PaperTable:
    """The printed measures over all languages, of every split that has them; bold: the interval lies above that of every other trained arm."""
    mine = figures.filter(pl.col("language") == _ALL)
    found = {(row["arm"], row["split"], row["metric"]): row for row in mine.iter_rows(named=True)}
    splits = list(dict.fromkeys(mine["split"]))
    columns = [(s, m) for s in splits for m in SHOWN if any(key[1:] == (s, m) for key in found)]
    arms = list(dict.fromkeys(mine["arm"]))
    rows = []
    for arm in arms:
        cells = []
        for column in columns:
            row = found.get((arm, *column))
            rivals = [
                own for key, own in found.items() if key[1:] == column and key[0] != arm and not _is_untrained(key[0])
            ]
            cells.append((_cell(row), row is not None and not _is_untrained(arm) and is_above(row, rivals)))
        rows.append((arm, cells))
    return PaperTable([(split, measure_of(metric).title) for split, metric in columns], rows)


def _is_untrained(arm: str) -> bool:
    from pipeline.trials import UNTRAINED

    return arm == UNTRAINED


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    half = "" if row["low"] is None else f" ± {row['mean'] - row['low']:.3f}"
    return f"{row['mean']:.3f}{half}"
