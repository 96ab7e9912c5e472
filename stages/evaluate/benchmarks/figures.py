"""Rows of the evaluation table from what the harness measured: every metric before and after, and its change.

Split `benchmark`. metric: `TASK/METRIC`, and `TASK/METRIC_change`, each with its standard error as `…_stderr`; `benchmarks` and `benchmarks_change`: the mean over tasks of the metric
that each names first, per language and for all, of tasks where that is a share (0 to 1, higher is better).

Intervals (95%): of a metric that is a mean over questions from the questions (`stages.evaluate.intervals`), of its change from the
differences question by question (arXiv 2411.00640), where all are alike Wilson's; of any other from the harness's standard errors, as if both models had met other
questions. Of a mean over tasks: the mean of the ends, as if all tasks moved together, since translations of one question do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.ids import seed_for
from stages.evaluate.benchmarks.child import Metric
from stages.evaluate.benchmarks.wanted import Task
from stages.evaluate.intervals import Z, interval, of_changes
from stages.evaluate.metrics import AFTER, ALL, BEFORE, CHANGE

SPLIT = "benchmark"
MEAN = "benchmarks"
STDERR = "_stderr"
_CHANGE = "_change"


@dataclass(frozen=True)
class _Figure:
    model: str
    value: float
    n: int
    span: tuple[float, float] | None
    stderr: float | None = None


def rows(
    tasks: Sequence[Task], before: Mapping[str, Sequence[Metric]], after: Mapping[str, Sequence[Metric]], seed: int
) -> Iterator[dict[str, Any]]:
    """before, after: task -> its metrics. seed: of the run."""
    firsts: dict[str, list[list[_Figure]]] = defaultdict(list)
    for task in tasks:
        later = {metric.name: metric for metric in after[task.name]}
        for number, one in enumerate(before[task.name]):
            name = f"{task.name}/{one.name}"
            figures = _figures(one, later[one.name], task, seed_for(seed, "benchmark", name))
            yield from _rows(task.language, name, figures)
            if number == 0 and _is_share(one) and _is_share(later[one.name]):
                for language in (task.language, ALL):
                    firsts[language].append(figures)
    for language, found in firsts.items():
        yield from _rows(language, MEAN, [_mean(column) for column in zip(*found, strict=True)])


def _figures(before: Metric, after: Metric, task: Task, seed: int) -> list[_Figure]:
    """Of a metric: before, after, change."""
    found = [_of_one(BEFORE, before, task, seed), _of_one(AFTER, after, task, seed)]
    change = after.value - before.value
    if before.values and before.docs == after.docs:
        gaps = [b - a for a, b in zip(before.values, after.values, strict=True)]
        span = of_changes(gaps, [str(doc) for doc in before.docs], seed)
        return [*found, _Figure(CHANGE, change, len(gaps), span, _standard_error(gaps))]
    if before.stderr is None or after.stderr is None:
        return [*found, _Figure(CHANGE, change, task.asked_of, None)]
    error = math.hypot(before.stderr, after.stderr)
    return [*found, _Figure(CHANGE, change, task.asked_of, (change - Z * error, change + Z * error), error)]


def _of_one(model: str, metric: Metric, task: Task, seed: int) -> _Figure:
    if metric.values:
        share = set(metric.values) <= {0.0, 1.0}
        span = interval(metric.values, [str(doc) for doc in metric.docs], seed, share)
        return _Figure(model, metric.value, len(metric.values), span, metric.stderr)
    error = metric.stderr
    span = None if error is None else (metric.value - Z * error, metric.value + Z * error)
    return _Figure(model, metric.value, task.asked_of, span, error)


def _mean(figures: Sequence[_Figure]) -> _Figure:
    spans = [figure.span for figure in figures if figure.span is not None]
    whole = len(spans) == len(figures)
    low, high = (sum(span[end] for span in spans) / len(figures) for end in (0, 1))
    value = sum(figure.value for figure in figures) / len(figures)
    return _Figure(figures[0].model, value, sum(f.n for f in figures), (low, high) if whole else None)


def _rows(language: str, name: str, figures: Sequence[_Figure]) -> Iterator[dict[str, Any]]:
    for figure in figures:
        yield {
            "model": figure.model,
            "split": SPLIT,
            "language": language,
            "metric": name + (_CHANGE if figure.model == CHANGE else ""),
            "value": figure.value,
            "n": figure.n,
            "low": figure.span[0] if figure.span else None,
            "high": figure.span[1] if figure.span else None,
        }
        if figure.stderr is not None:
            yield _error_row(language, name, figure)


def _error_row(language: str, name: str, figure: _Figure) -> dict[str, Any]:
    """As the harness names it."""
    return {
        "model": figure.model,
        "split": SPLIT,
        "language": language,
        "metric": f"{name}{_CHANGE if figure.model == CHANGE else ''}{STDERR}",
        "value": figure.stderr,
        "n": figure.n,
        "low": None,
        "high": None,
    }


def _standard_error(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _is_share(metric: Metric) -> bool:
    return metric.higher_is_better and 0.0 <= metric.value <= 1.0
