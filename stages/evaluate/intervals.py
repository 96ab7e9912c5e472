"""95% intervals for shares, means and half-valued rates.

Translations of one task are not independent: items that share a group are resampled together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959963984540054
RESAMPLES = 2000
FITS = 300
"""Resamples where each costs a fit."""
FEW = 8
"""Below this many groups their resamples are too alike: a bootstrap interval would be far too narrow."""
_CELLS = 4_000_000


def interval(values: Sequence[float], groups: Sequence[str], seed: int, share: bool) -> tuple[float, float] | None:
    """The 95% interval of the mean of `values` (one group per value); None where there are too few groups for one.

    share: the values say what happened (1), did not (0) or was a tie (one half). Wilson's interval with the number of
    groups as n is exact for shares without ties and without a group twice, and the cautious choice where resampling
    sees too little: fewer than `FEW` groups, or values that are all alike. Anything else is a percentile bootstrap over
    whole groups, seeded.
    """
    count = len(set(groups))
    if share and count > 1:
        simple = count == len(values) and set(values) <= {0.0, 1.0}
        if simple or count < FEW or len(set(values)) == 1:
            return wilson(sum(values) / len(values), count)
    return bootstrap(values, groups, seed) if count >= FEW else None


def of_changes(changes: Sequence[float], groups: Sequence[str], seed: int) -> tuple[float, float] | None:
    """The 95% interval of the mean change of a share; None where there are too few groups for one. Changes that are all alike are alike in every
    resample: of those that are not, there was none in so many groups, which is what Wilson's interval is for."""
    count = len(set(groups))
    if count > 1 and len(set(changes)) == 1:
        change, half = changes[0], wilson(0.0, count)[1]
        most = 1.0 if abs(change) <= 1.0 else math.inf  # a benchmark's metric may be no share
        return max(-most, change - half), min(most, change + half)
    return bootstrap(changes, groups, seed) if count >= FEW else None


def of_statistic(
    statistic: Callable[[Sequence[int]], float], groups: Sequence[str], seed: int
) -> tuple[float, float] | None:
    """Percentile interval of a statistic of item indices over `FITS` resamples of whole groups; None with fewer than `FEW` groups."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(members) < FEW:
        return None
    names, generator = sorted(members), np.random.default_rng(seed)
    values = []
    for _ in range(FITS):
        drawn = generator.integers(len(names), size=len(names))
        values.append(statistic([index for n in drawn for index in members[names[n]]]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share out of n (Wilson 1927)."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], groups: Sequence[str], seed: int) -> tuple[float, float]:
    """Percentile interval of the mean over `RESAMPLES` resamples of whole groups; equal seeds give equal intervals."""
    members: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    sum_G = np.array([sum(members[group]) for group in sorted(members)])
    size_G = np.array([len(members[group]) for group in sorted(members)])
    generator = np.random.default_rng(seed)
    means = []
    step = max(1, _CELLS // len(sum_G))
    for start in range(0, RESAMPLES, step):
        draw_RG = generator.integers(len(sum_G), size=(min(step, RESAMPLES - start), len(sum_G)))
        means.append(sum_G[draw_RG].sum(axis=1) / size_G[draw_RG].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
