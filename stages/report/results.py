"""Before and after training: every measured value per split, metric and language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from stages.report.charts import Change, changes
from stages.report.data import Tables, in_order
from stages.report.svg import Format
from stages.report.text import number, percent, short, words

ALL = "all"
SPLITS = {
    "test": "Test: held-out prompts and pairs of the trained languages",
    "authored": "Authored pairs: the rejected answer is wrong by construction",
    "unseen": "Unseen languages: never trained on",
    "dev": "Dev: used for choices, not for claims",
}


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. reference: the value that means no preference or no change, for comparisons."""

    title: str
    meaning: str
    share: bool = False
    reference: float | None = None

    @property
    def show(self) -> Format:
        """Shares as percentages, the rest as numbers."""
        return _one_decimal if self.share else number

    @property
    def axis(self) -> Format:
        """The same on an axis."""
        return percent if self.share else short


METRICS = {
    "accuracy": Metric(
        "Preference accuracy",
        "Share of pairs whose chosen answer gets the higher mean log-probability per token; ties count one half, "
        "so 50% is guessing",
        share=True,
        reference=0.5,
    ),
}


@dataclass(frozen=True)
class Row:
    """One language. change: after minus before, or the comparison itself minus its reference; clear: beyond noise."""

    language: str
    before: float | None
    after: float | None
    versus: float | None
    before_interval: tuple[float, float] | None
    after_interval: tuple[float, float] | None
    versus_interval: tuple[float, float] | None
    n: int
    change: float | None
    clear: bool


@dataclass(frozen=True)
class Measured:
    """One metric on one split. paired: rows have before and after; else they compare after with before directly."""

    name: str
    metric: Metric
    paired: bool
    rows: list[Row]
    chart: Markup


@dataclass(frozen=True)
class Results:
    """One round: splits in reading order, each with its title and metrics."""

    round: int
    splits: list[tuple[str, str, list[Measured]]]


def results(tables: Tables, round_: int, languages: Sequence[str]) -> Results | None:
    """None when nothing was evaluated."""
    columns = ["model", "split", "language", "metric", "value", "n", "low", "high"]
    rows = tables.read("evaluation", round_, columns).rows(named=True)
    if not rows:
        return None
    splits = []
    for split in in_order(list(SPLITS), [row["split"] for row in rows]):
        mine = [row for row in rows if row["split"] == split]
        names = in_order(list(METRICS), [row["metric"] for row in mine])
        measured = [_measured(name, [row for row in mine if row["metric"] == name], languages) for name in names]
        splits.append((split, SPLITS.get(split, split), measured))
    return Results(round_, splits)


def _measured(name: str, rows: list[dict], languages: Sequence[str]) -> Measured:
    metric = METRICS.get(name) or Metric(words(name).capitalize(), "")
    by_key = {(row["language"], row["model"]): row for row in rows}
    order = in_order([ALL, *languages], [row["language"] for row in rows])
    paired = any(row["model"] in ("before", "after") for row in rows)
    built = [_row(language, by_key, metric, paired) for language in order]
    shown = [
        Change(r.language, r.before, r.after, r.before_interval, r.after_interval)
        if paired
        else Change(r.language, None, r.versus, None, r.versus_interval)
        for r in built
        if r.before is not None or r.after is not None or r.versus is not None
    ]
    chart = (
        changes(shown, f"{metric.title} per language", x_format=metric.axis, reference=metric.reference)
        if shown
        else Markup("")
    )
    return Measured(name, metric, paired, built, chart)


def _row(language: str, by_key: dict[tuple[str, str], dict], metric: Metric, paired: bool) -> Row:
    before, after, versus = (by_key.get((language, model), {}) for model in ("before", "after", "after vs before"))
    spans = [_interval(row) for row in (before, after, versus)]
    change, clear = None, False
    if paired:
        if before.get("value") is not None and after.get("value") is not None:
            change = after["value"] - before["value"]
            clear = bool(spans[0] and spans[1] and (spans[0][1] < spans[1][0] or spans[1][1] < spans[0][0]))
    elif versus.get("value") is not None:
        reference = metric.reference or 0.0
        change = versus["value"] - reference
        clear = bool(spans[2] and not spans[2][0] <= reference <= spans[2][1])
    return Row(
        language=language,
        before=before.get("value"),
        after=after.get("value"),
        versus=versus.get("value"),
        before_interval=spans[0],
        after_interval=spans[1],
        versus_interval=spans[2],
        n=max(row.get("n", 0) for row in (before, after, versus)),
        change=change,
        clear=clear,
    )


def _interval(row: dict) -> tuple[float, float] | None:
    low, high = row.get("low"), row.get("high")
    return (low, high) if low is not None and high is not None else None


def _one_decimal(value: float) -> str:
    return percent(value, 1)
