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
  inconsistent verdicts and equal answers are ties, one half. …_length_controlled: at equal length
  (stages.evaluate.length_controlled). judge_consistency: share of differing answers on which
  both orders agree. judge_mass: mean probability the judge puts on its two possible replies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.ids import seed_for
from schemas.tables import TABLES
from stages.evaluate.intervals import interval, of_statistic
from stages.evaluate.length_controlled import length_controlled

WIN_RATE, CONTROLLED = "win_rate", "_length_controlled"
BEFORE, AFTER, CHANGE = "before", "after", "after vs before"
ALL = "all"
_SHARES = {
    "accuracy",
    "implicit_reward_accuracy",
    "answer_language",
    "truncated",
    "empty",
    "refused",
    "win_rate",
    "win_rate_self_judged",
    "judge_consistency",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured value. group_id: items of one translation group are not independent. length: of a win rate, characters of the
    answer after less those of the one before."""

    model: str
    split: str
    language: str
    metric: str
    group_id: str
    value: float
    length: float = 0.0


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
    rows = [_row(key, found, seed) for key, found in sorted(cells.items())]
    rows += [_controlled(key, found, seed) for key, found in sorted(cells.items()) if key[3].startswith(WIN_RATE)]
    return pa.Table.from_pylist([*rows, *benchmarks], schema=TABLES["evaluation"].schema)


def _controlled(key: tuple[str, str, str, str], items: list[Measurement], seed: int) -> dict[str, Any]:
    """The row of a win rate at equal length."""
    model, split, language, metric = key
    key = model, split, language, f"{metric}{CONTROLLED}"

    def rate(chosen: Sequence[int]) -> float:
        return length_controlled([items[n].value for n in chosen], [items[n].length for n in chosen])

    groups = [item.group_id for item in items]
    bounds = of_statistic(rate, groups, seed_for(seed, "interval", *key)) if items else None
    return {
        "model": model,
        "split": split,
        "language": language,
        "metric": key[3],
        "value": rate(range(len(items))) if items else None,
        "n": len(items),
        "low": bounds[0] if bounds else None,
        "high": bounds[1] if bounds else None,
    }


def _row(key: tuple[str, str, str, str], items: list[Measurement], seed: int) -> dict[str, Any]:
    model, split, language, metric = key
    values = [item.value for item in items]
    groups = [item.group_id for item in items]
    bounds = interval(values, groups, seed_for(seed, "interval", *key), metric in _SHARES)
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
