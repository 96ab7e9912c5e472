"""Training curves from the metrics that TRL logged."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from markupsafe import Markup

from stages.report.charts import Series, lines
from stages.report.data import Tables
from stages.report.text import number, percent, short

MAIN = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "learning_rate": "Learning rate",
}


@dataclass(frozen=True)
class Curve:
    """One named value over steps, with its first and last figure."""

    title: str
    first: str
    last: str
    chart: Markup


@dataclass(frozen=True)
class Curves:
    """One round's main curves, and the last value of everything else that was logged: (name, step, value). round None: sft."""

    round: int | None
    curves: list[Curve]
    others: list[tuple[str, int, float]]


def curves(tables: Tables, round_: int | None) -> Curves | None:
    """Those of a round, or of sft; None when nothing was logged."""
    table = "sft_metrics" if round_ is None else "metrics"
    frame = tables.read(table, round_, ["step", "name", "value"]).filter(pl.col("value").is_finite())
    if frame.is_empty():
        return None
    frame = frame.sort("step", maintain_order=True).unique(["step", "name"], keep="last", maintain_order=True)
    found = [_curve(name, title, frame) for name, title in MAIN.items()]
    rest = frame.filter(~pl.col("name").is_in(list(MAIN))).group_by("name", maintain_order=True).last().sort("name")
    others = [(row["name"], row["step"], row["value"]) for row in rest.rows(named=True)]
    return Curves(round_, [curve for curve in found if curve], others)


def _curve(name: str, title: str, frame: pl.DataFrame) -> Curve | None:
    mine = frame.filter(name=name)
    if mine.is_empty():
        return None
    show = percent if name == "rewards/accuracies" else number
    steps, values = mine["step"].to_list(), mine["value"].to_list()
    label = f"{title} over {len(steps)} logged steps, from {show(values[0])} to {show(values[-1])}"
    chart = lines([steps], [Series(title, "kept", values)], label, y_format=percent if show is percent else short)
    return Curve(title, show(values[0]), show(values[-1]), chart)
