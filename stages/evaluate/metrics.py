"""From measured items to rows of the evaluation table.

Metrics (docs/methods.md section 9), each per split and language, and for all languages of a split together:
- accuracy: share of pairs with the higher mean-token log-probability on chosen, a tie one half (before, after).
- implicit_reward_accuracy: share with the higher log pi / pi_0 (sums over the answer) on chosen, pi_0 the round-0
  policy, a tie one half (after only: before, all are ties).
- logp_chosen, logp_rejected: mean-token log-probability in nats (before, after); logp_chosen_change,
  logp_rejected_change, accuracy_change: per pair, after minus before.
- answer_language: share of answers in the language of the prompt; truncated: share cut by max_tokens; empty: without
  any text; refused: begins with a phrase of refusal (stages.text.refusals), of languages that have a list; repetition: share of a text's runs of 16 characters that occurred before; characters: length (before, after).
- win_rate, or win_rate_self_judged when the judge is the round-0 policy itself: after against before, in both orders;
  inconsistent verdicts and equal answers are ties, one half. baseline_win_rate (before, after; …_change: after minus before, prompt by
  prompt): the same against `evaluate.baseline`. …_length_controlled: at equal length (stages.evaluate.length_controlled).
- judge_consistency: share of differing answers on which both orders agree. judge_mass: mean probability the judge puts on its two possible
  replies. judge_agreement: share of differing answers on which two judges have the same verdict (win, loss or tie); judge_kappa: Cohen's
  kappa of these verdicts (stages.evaluate.kappa).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.ids import seed_for
from schemas.tables import TABLES
from stages.evaluate.intervals import interval, of_changes, of_statistic
from stages.evaluate.kappa import kappa
from stages.evaluate.length_controlled import length_controlled

WIN_RATES = ("win_rate", "win_rate_self_judged", "baseline_win_rate", "baseline_win_rate_self_judged")
CONTROLLED, KAPPA = "_length_controlled", "judge_kappa"
BEFORE, AFTER, CHANGE, BASELINE = "before", "after", "after vs before", "baseline"
ALL = "all"
_SHARES = {
    "accuracy",
    "implicit_reward_accuracy",
    "answer_language",
    "truncated",
    "empty",
    "refused",
    *WIN_RATES,
    "judge_consistency",
    "judge_agreement",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured value. group_id: items of one translation group are not independent. beside: of a win rate, characters of the answer
    less those of the one it is held against; of judge_kappa, the second judge's verdict."""

    model: str
    split: str
    language: str
    metric: str
    group_id: str
    value: float
    beside: float = 0.0


def evaluation_table(
    items: Iterable[Measurement],
    expected: Iterable[tuple[str, str, str]],
    seed: int,
    benchmarks: Iterable[dict[str, Any]] = (),
) -> pa.Table:
    """Mean, count and 95% interval of every (model, split, language, metric), and of all languages together.

    expected: (model, split, metric) that have a row for all languages even when nothing was measured (n = 0, no value).
    benchmarks: rows of `stages.evaluate.benchmarks.figures`, as they are.
    """
    cells: dict[tuple[str, str, str, str], list[Measurement]] = defaultdict(list)
    for model, split, metric in expected:
        cells[model, split, ALL, metric] = []
    for item in items:
        for language in (item.language, ALL):
            cells[item.model, item.split, language, item.metric].append(item)
    rows = [_row(key, found, seed) for key, found in sorted(cells.items()) if key[3] != KAPPA]
    for key, found in sorted(cells.items()):
        if key[3] in WIN_RATES:
            rows.append(_fitted((*key[:3], f"{key[3]}{CONTROLLED}"), _in_own_units(found), length_controlled, seed))
        elif key[3] == KAPPA:
            rows.append(_fitted(key, found, kappa, seed))
    return pa.Table.from_pylist([*rows, *benchmarks], schema=TABLES["evaluation"].schema)


def _in_own_units(items: list[Measurement]) -> list[Measurement]:
    """Differences in length over their standard deviation in the item's language: a character says more in some scripts than in others."""
    lengths: dict[str, list[float]] = defaultdict(list)
    for item in items:
        lengths[item.language].append(item.beside)
    spread = {language: float(np.std(found)) or 1.0 for language, found in lengths.items()}
    return [replace(item, beside=item.beside / spread[item.language]) for item in items]


def _fitted(
    key: tuple[str, str, str, str],
    items: list[Measurement],
    statistic: Callable[[Sequence[float], Sequence[float]], float],
    seed: int,
) -> dict[str, Any]:
    """The row of a figure that is no mean: a statistic of the items' values and of what stands beside them."""
    model, split, language, metric = key

    def of(chosen: Sequence[int]) -> float:
        return statistic([items[n].value for n in chosen], [items[n].beside for n in chosen])

    groups = [item.group_id for item in items]
    value = of(range(len(items))) if items else None
    bounds = of_statistic(of, groups, seed_for(seed, "interval", *key)) if items else None
    if bounds is not None and any(map(math.isnan, bounds)):
        bounds = None  # not defined on some resamples
    return {
        "model": model,
        "split": split,
        "language": language,
        "metric": metric,
        "value": None if value is None or math.isnan(value) else value,
        "n": len(items),
        "low": bounds[0] if bounds else None,
        "high": bounds[1] if bounds else None,
    }


def _row(key: tuple[str, str, str, str], items: list[Measurement], seed: int) -> dict[str, Any]:
    model, split, language, metric = key
    values = [item.value for item in items]
    groups = [item.group_id for item in items]
    drawn = seed_for(seed, "interval", *key)
    if metric.removesuffix("_change") in _SHARES - {metric}:
        bounds = of_changes(values, groups, drawn)
    else:
        bounds = interval(values, groups, drawn, metric in _SHARES)
    return {
        "model": model,
        "split": split,
        "language": language,
        "metric": metric,
        "value": sum(values) / len(values) if values else None,
        "n": len(values),
        "low": bounds[0] if bounds else None,
        "high": bounds[1] if bounds else None,
    }
