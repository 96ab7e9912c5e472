"""How much more one arm of study 3 has than another, with an interval over seeds and prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from benchmarks.quality.results import Values
from stages.compare.seeds import Mean, mean_of

_NORMAL975 = NormalDist().inv_cdf(0.975)


def held_out_gain(pairs: Sequence[tuple[Values, Values]], figure: str, part: str, languages: int) -> Mean:
    """Difference of `reward_accuracy` or `margin` on the held-out pairs of `part`, from rows of both arms at the same seed (one pair of rows: no
    interval).

    Squares of two half-widths add up: over seeds (damage, half and training; Student's t) and over prompts, which are the same at every seed
    (normal; the `languages` pairs of a prompt are translations and count as one). What is left of a seed and a prompt together is in both, so the
    interval is a little wide. The part of the prompts is from the rows that say what each pair gained; the first ones do not.
    """
    over = mean_of([one[f"{figure}/{part}"] - other[f"{figure}/{part}"] for one, other in pairs])
    whole = [both for both in pairs if all(f"gain/{part}/000" in row for row in both)]
    if over.low is None or not whole:
        return over
    less_Q = np.mean(
        [np.subtract(*(_by_prompt(row, figure, part, languages) for row in both)) for both in whole], axis=0
    )
    half = math.hypot(over.mean - over.low, _NORMAL975 * float(less_Q.std(ddof=1)) / math.sqrt(len(less_Q)))
    return Mean(over.mean, over.mean - half, over.mean + half, over.seeds)


def tax_gain(pairs: Sequence[tuple[Values, Values]]) -> Mean:
    """Difference of the tax, over seeds."""
    return mean_of([one["tax"] - other["tax"] for one, other in pairs])


def _by_prompt(row: Values, figure: str, part: str, languages: int) -> np.ndarray:
    """The figure of each prompt's pairs [Q]."""
    gain_N = np.array([row[name] for name in sorted(row) if name.startswith(f"gain/{part}/")])
    value_N = gain_N if figure == "margin" else (np.sign(gain_N) + 1) / 2
    return value_N.reshape(-1, languages).mean(axis=1)
