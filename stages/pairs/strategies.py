"""Which two answers of a prompt make a pair: `pairs.strategy`.

Candidates of a prompt lie in the columns of a row; NaN scores are candidates that are not there. Suffixes: P prompts,
C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.pairs.length_control import extremes

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Pick:
    """A pair of a prompt: columns of chosen and rejected, and the gap between their scores."""

    prompt: int
    chosen: int
    rejected: int
    gap: float


@dataclass(frozen=True)
class Settings:
    """What strategies are told. margins_P: least gap, per prompt. seeds_P: of random choices. sigmas, cap: as in the config."""

    margins_P: Scores
    seeds_P: Sequence[int]
    sigmas: float
    cap: int


Strategy = Callable[[Scores, Settings], list[Pick]]
"""Every prompt's pairs, or, where it has none, the pick whose gap is too small (chosen == rejected: nothing to pick from)."""


def best_worst(score_PC: Scores, settings: Settings) -> list[Pick]:
    """The best against the worst; ties: the first column."""
    choice = extremes(score_PC, np.zeros_like(score_PC))
    columns = (column.tolist() for column in (choice.best_P, choice.worst_P, choice.gap_P))
    return [Pick(p, *picked) for p, picked in enumerate(zip(*columns, strict=True))]


def best_random(score_PC: Scores, settings: Settings) -> list[Pick]:
    """The best against one that is worse by the margin, drawn at random (Iterative DPO as arXiv 2409.18110 and others do it)."""
    found = []
    for p, row_C in enumerate(score_PC):
        best, worst = _best(row_C), _worst(row_C)
        gaps_C = row_C[best] - row_C
        worse = np.flatnonzero((gaps_C > 0) & (gaps_C >= settings.margins_P[p]))
        drawn = int(np.random.default_rng(settings.seeds_P[p]).choice(worse)) if len(worse) else worst
        found.append(_pick(p, row_C, best, drawn))
    return found


def best_mean(score_PC: Scores, settings: Settings) -> list[Pick]:
    """The best against the one closest to the mean of the prompt's scores (arXiv 2605.26293)."""
    found = []
    for p, row_C in enumerate(score_PC):
        best, mean = _best(row_C), float(np.nanmean(row_C))
        below_C = np.where(row_C < row_C[best], np.abs(row_C - mean), np.nan)
        near = _worst(row_C) if np.isnan(below_C).all() else int(np.nanargmin(below_C))
        found.append(_pick(p, row_C, best, near))
    return found


def sigma(score_PC: Scores, settings: Settings) -> list[Pick]:
    """The answers closest to mean + k sd and mean - k sd of the prompt's scores: with many candidates the very best and the very
    worst are outliers (arXiv 2502.16825)."""
    found = []
    for p, row_C in enumerate(score_PC):
        mean, spread = float(np.nanmean(row_C)), float(np.nanstd(row_C))
        ends = [mean + settings.sigmas * spread, mean - settings.sigmas * spread]
        high, low = (int(np.nanargmin(np.abs(row_C - end))) for end in ends)
        found.append(_pick(p, row_C, high, low))
    return found


def every(score_PC: Scores, settings: Settings) -> list[Pick]:
    """All pairs with at least the margin, the widest first, at most `cap` a prompt."""
    found = []
    for p, row_C in enumerate(score_PC):
        there = np.flatnonzero(~np.isnan(row_C))
        picks = [_pick(p, row_C, int(i), int(j)) for i in there for j in there if row_C[i] > row_C[j]]
        wide = [pick for pick in picks if pick.gap >= settings.margins_P[p]]
        wide.sort(key=lambda pick: (-pick.gap, pick.chosen, pick.rejected))
        found += wide[: settings.cap] or [_pick(p, row_C, _best(row_C), _worst(row_C))]
    return found


STRATEGIES: Mapping[str, Strategy] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "best_mean": best_mean,
    "sigma": sigma,
    "all": every,
}


def _pick(prompt: int, row_C: Scores, chosen: int, rejected: int) -> Pick:
    return Pick(prompt, chosen, rejected, float(row_C[chosen] - row_C[rejected]))


def _best(row_C: Scores) -> int:
    return int(np.where(np.isnan(row_C), -np.inf, row_C).argmax())


def _worst(row_C: Scores) -> int:
    return int(np.where(np.isnan(row_C), np.inf, row_C).argmin())
