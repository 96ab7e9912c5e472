"""What alignment cost elsewhere ("tax"): the change on every benchmark, per task and language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from stages.report.charts import ChangeBar, changes
from stages.report.text import short

SPLIT = "benchmark"
_MEAN, _CHANGE, _STDERR = "benchmarks", "_change", "_stderr"
_CHART = 40
"""Lines of the chart; a table takes more."""


@dataclass(frozen=True)
class TaxRow:
    """A metric of a task in a language; task empty: the mean over the tasks of the language. clear: the interval of the change leaves
    out 0."""

    task: str
    metric: str
    language: str
    before: float | None
    after: float | None
    before_error: float | None
    after_error: float | None
    change: float | None
    change_interval: tuple[float, float] | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether anything is to be said of a direction."""
        span = self.change_interval
        return span is not None and not span[0] <= 0 <= span[1]


@dataclass(frozen=True)
class Tax:
    """Means first, then tasks in the order of the table; chart: of the changes."""

    rows: list[TaxRow]
    chart: Markup
    charted: int


def tax(rows: Sequence[dict[str, Any]]) -> Tax | None:
    """Of rows of the evaluation table; None without benchmarks."""
    mine = {(row["metric"], row["language"], row["model"]): row for row in rows if row["split"] == SPLIT}
    names = dict.fromkeys(
        (metric, language) for metric, language, model in mine if model == "before" and not metric.endswith(_STDERR)
    )
    if not names:
        return None
    found = [_row(mine, metric, language) for metric, language in names]
    found.sort(key=lambda row: bool(row.task))
    shown = found[:_CHART]
    bars = [ChangeBar(_label(row), None, row.change, None, row.change_interval) for row in shown]
    return Tax(found, changes(bars, "Change per task and language", x_format=short, reference=0.0), len(shown))


def _row(mine: dict[tuple[str, str, str], dict[str, Any]], metric: str, language: str) -> TaxRow:
    before, after = (mine.get((metric, language, model), {}) for model in ("before", "after"))
    change = mine.get((metric + _CHANGE, language, "after vs before"), {})
    low, high = change.get("low"), change.get("high")
    task, _, measure = metric.rpartition("/")
    return TaxRow(
        task=task,
        metric="mean over tasks" if metric == _MEAN else measure,
        language=language,
        before=before.get("value"),
        after=after.get("value"),
        before_error=mine.get((metric + _STDERR, language, "before"), {}).get("value"),
        after_error=mine.get((metric + _STDERR, language, "after"), {}).get("value"),
        change=change.get("value"),
        change_interval=None if low is None or high is None else (low, high),
        n=before.get("n", 0),
    )


def _label(row: TaxRow) -> str:
    return row.task or f"mean {row.language}"
