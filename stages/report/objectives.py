"""Objectives in sequence (OrthAlign): how each one fares while later ones train, and what the subspaces did."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from markupsafe import Markup

from stages.report.charts import Series, lines
from stages.report.data import Tables
from stages.report.text import percent

PREFIX = "objective/"


@dataclass(frozen=True)
class ObjectiveRow:
    """After one objective. rewards: reward accuracy of every objective, None for those not trained yet or not measured.

    directions: mean number protected in a matrix; energy: share of the squared change they hold; leak, exported: share of
    the objective's change inside earlier subspaces, in the weights as trained and as exported.
    """

    name: str
    step: int
    rewards: list[float | None]
    directions: float | None
    energy: float | None
    leak: float | None
    exported: float | None


@dataclass(frozen=True)
class Objectives:
    """One round: a row per finished objective, a panel per objective that was measured: (name, first, last, chart)."""

    round: int
    names: list[str]
    rows: list[ObjectiveRow]
    panels: list[tuple[str, str, str, Markup]]


def objectives(tables: Tables, round_: int, names: list[str]) -> Objectives | None:
    """names: the sequence's, in order. None when there is none, or nothing of it was logged."""
    frame = tables.read("metrics", round_, ["step", "name", "value"]).filter(
        pl.col("name").str.starts_with(PREFIX) & pl.col("value").is_finite()
    )
    if not names or frame.is_empty():
        return None
    values = {(row["name"], row["step"]): row["value"] for row in frame.rows(named=True)}
    ends = sorted({step for _, step in values})
    rows = [
        ObjectiveRow(name, step, [values.get((f"{PREFIX}{other}/reward_accuracy", step)) for other in names], *figures)
        for name, step in zip(names, ends, strict=False)
        for figures in [
            [values.get((f"{PREFIX}{name}/{f}", step)) for f in ("directions", "energy", "leak", "leak_exported")]
        ]
    ]
    panels = [panel for name in names if (panel := _panel(name, values))]
    return Objectives(round_, names, rows, panels)


def _panel(name: str, values: dict[tuple[str, int], float]) -> tuple[str, str, str, Markup] | None:
    """Reward accuracy and accuracy of one objective after each objective since its own."""
    found = [
        (title, css, sorted((step, v) for (n, step), v in values.items() if n == f"{PREFIX}{name}/{figure}"))
        for title, css, figure in (("reward accuracy", "kept", "reward_accuracy"), ("accuracy", "dropped0", "accuracy"))
    ]
    drawn = [(title, css, points) for title, css, points in found if points]
    if not drawn:
        return None
    first, last = drawn[0][2][0][1], drawn[0][2][-1][1]
    label = f"{name}: dev pairs after each objective since its own, reward accuracy from {percent(first)} to {percent(last)}"
    series = [Series(title, css, [value for _, value in points]) for title, css, points in drawn]
    chart = lines([[step for step, _ in points] for _, _, points in drawn], series, label, y_format=percent)
    return name, percent(first), percent(last), chart
