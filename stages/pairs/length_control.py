"""Best against worst answer of each prompt, and the per-token cost that takes length out of the choice.

Matrices have a row a prompt and a column a candidate; NaN scores are candidates that are not there. Suffixes: P prompts,
C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_STEPS = 60
_KEPT = 0.5
"""Of the prompts that give a pair without a cost, those that must give one with it. Our choice."""


class Fitted(NamedTuple):
    """A cost per token, the mean of len(chosen) - len(rejected) with it, and the prompts that give a pair with it and without."""

    cost: float
    excess: float
    pairs: int
    before: int


@dataclass(frozen=True)
class Extremes:
    """Columns of the best and the worst candidate and the gap between their (adjusted) scores, per prompt."""

    best_P: NDArray[np.int64]
    worst_P: NDArray[np.int64]
    gap_P: NDArray[np.float64]

    def pairs(self, min_margin: float) -> NDArray[np.bool_]:
        """Which prompts give a pair: the gap is positive and at least min_margin."""
        return (self.gap_P > 0) & (self.gap_P >= min_margin)


def extremes(
    score_PC: NDArray[np.float64], tokens_PC: NDArray[np.float64], cost: float | NDArray[np.float64] = 0.0
) -> Extremes:
    """Best and worst by score - cost * tokens; cost: one number or one a prompt. Ties: the first column."""
    adjusted_PC = score_PC - np.reshape(cost, (-1, 1)) * tokens_PC
    there_PC = ~np.isnan(score_PC)
    best_P = np.where(there_PC, adjusted_PC, -np.inf).argmax(axis=1)
    worst_P = np.where(there_PC, adjusted_PC, np.inf).argmin(axis=1)
    rows = np.arange(len(score_PC))
    return Extremes(best_P, worst_P, adjusted_PC[rows, best_P] - adjusted_PC[rows, worst_P])


def fit_cost(
    score_PC: NDArray[np.float64], tokens_PC: NDArray[np.float64], min_margin: float, in_sd: bool = False
) -> Fitted:
    """The cost per token with which the mean of len(chosen) - len(rejected) is closest to 0.

    A larger cost never makes a chosen answer longer nor a rejected one shorter, so over a fixed set of prompts the mean
    falls with the cost, in steps; bisection finds where it changes sign (ties, which come and go with the cost, can make
    several such places). Costs beyond the steepest score per token change nothing and bound the search. A cost that
    leaves less than half of the pairs is none: no pair at all is perfectly balanced. Without any pair, or when every
    pair's answers are equally long, the cost is 0. in_sd: min_margin counts standard deviations of the scores less cost.
    """
    excess, before = _excess(score_PC, tokens_PC, 0.0, min_margin, in_sd)
    if excess == 0:
        return Fitted(0.0, 0.0, before, before)
    bound = 1.0 + float(np.nanmax(score_PC) - np.nanmin(score_PC))  # token counts are whole numbers
    low, high = (0.0, bound) if excess > 0 else (-bound, 0.0)
    best = (abs(excess), 0.0, excess, before)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        excess, left = _excess(score_PC, tokens_PC, middle, min_margin, in_sd)
        if left < _KEPT * before:
            low, high = (low, middle) if middle > 0 else (middle, high)
            continue
        best = min(best, (abs(excess), middle, excess, left))
        if excess == 0:
            break
        low, high = (middle, high) if excess > 0 else (low, middle)
    return Fitted(*best[1:], before)


def _excess(
    score_PC: NDArray[np.float64], tokens_PC: NDArray[np.float64], cost: float, min_margin: float, in_sd: bool
) -> tuple[float, int]:
    """Mean of len(chosen) - len(rejected) over the pairs that this cost gives, 0 without pairs, and how many they are."""
    choice = extremes(score_PC, tokens_PC, cost)
    pairs_P = choice.pairs(min_margin * float(np.nanstd(score_PC - cost * tokens_PC)) if in_sd else min_margin)
    rows = np.flatnonzero(pairs_P)
    if not len(rows):
        return 0.0, 0
    return float(np.mean(tokens_PC[rows, choice.best_P[rows]] - tokens_PC[rows, choice.worst_P[rows]])), len(rows)
