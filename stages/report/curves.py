"""Training curves from the metrics that TRL logged."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from markupsafe import Markup

from stages.report.charts import Series, lines
from stages.report.data import Tables
from stages.report.objectives import PREFIX
from stages.report.text import number, percent, short

MAIN = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "learning_rate": "Learning rate",
    "allo/forget/loss": "Forgetting loss (token-level NPO)",
}
CHAIN: dict[str, dict[str, str]] = {
    "AdamW's step and the pull on it": {"merge/delta_norm": "|δ|", "merge/pull_norm": "|a τ|"},
    "Cosine of step and task vector": {"merge/cosine": "cos(δ, τ)"},
    "Entries of opposite sign": {"merge/sign_conflict": "opposite signs"},
    "Drift, in units of |τ|": {"merge/drift": "drift"},
    "Drift from the start": {"merge/drift_norm": "drift"},
    "Sum of merge weights": {"merge/alpha_sum": "Σ a_t"},
    "Share of the update left by the projection": {"merge/projected": "|Π u| / |u|"},
    "Languages' gradients that point apart": {"surgery/conflicts": "share of adapters and two languages"},
    "Cosine of the resolved gradient and the plain one": {"surgery/cosine": "cos"},
}
"""What the optimizer's chain and surgery did: panels of one or two lines (docs/methods.md sections 5, 6 and 8)."""
_SHARES = {"rewards/accuracies", "merge/sign_conflict", "merge/projected", "surgery/conflicts"}


@dataclass(frozen=True)
class Curve:
    """One named value over steps, with its first and last figure; `and_` names a second, dashed line."""

    title: str
    first: str
    last: str
    chart: Markup
    line: str = ""
    and_: str = ""


@dataclass(frozen=True)
class Curves:
    """One round's main curves, those of merging and projecting, and the last value of everything else that was logged:
    (name, step, value). round None: sft."""

    round: int | None
    curves: list[Curve]
    chain: list[Curve]
    others: list[tuple[str, int, float]]


def curves(tables: Tables, round_: int | None) -> Curves | None:
    """Those of a round, or of sft; None when nothing was logged."""
    table = "sft_metrics" if round_ is None else "metrics"
    frame = tables.read(table, round_, ["step", "name", "value"]).filter(pl.col("value").is_finite())
    if frame.is_empty():
        return None
    frame = frame.sort("step", maintain_order=True).unique(["step", "name"], keep="last", maintain_order=True)
    found = [_curve({name: title}, title, frame) for name, title in MAIN.items()]
    chain = [_curve(names, title, frame) for title, names in CHAIN.items()]
    shown = {*MAIN, *(name for names in CHAIN.values() for name in names)}
    rest = frame.filter(~pl.col("name").is_in(sorted(shown))).group_by("name", maintain_order=True).last().sort("name")
    others = [
        (row["name"], row["step"], row["value"]) for row in rest.rows(named=True) if not _of_objective(row["name"])
    ]
    return Curves(round_, [curve for curve in found if curve], [curve for curve in chain if curve], others)


def _of_objective(name: str) -> bool:
    return name.startswith(PREFIX)


def _curve(names: dict[str, str], title: str, frame: pl.DataFrame) -> Curve | None:
    """names: of the values, and what each line is called; the second, if any, is dashed."""
    drawn = [(name, line, mine) for name, line in names.items() if not (mine := frame.filter(name=name)).is_empty()]
    if not drawn:
        return None
    show = percent if drawn[0][0] in _SHARES else number
    values = drawn[0][2]["value"].to_list()
    label = f"{title} over {len(values)} logged steps, from {show(values[0])} to {show(values[-1])}"
    series = [
        Series(line, css, mine["value"].to_list())
        for (_, line, mine), css in zip(drawn, ("kept", "dropped0"), strict=False)
    ]
    steps = [mine["step"].to_list() for _, _, mine in drawn]
    chart = lines(steps, series, label, y_format=percent if show is percent else short)
    second = drawn[1][1] if len(drawn) > 1 else ""
    return Curve(title, show(values[0]), show(values[-1]), chart, drawn[0][1], second)
