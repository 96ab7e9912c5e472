"""Cohen's kappa: how far two judges agree beyond what their habits alone would give (Cohen 1960)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def kappa(first: Sequence[float], second: Sequence[float]) -> float:
    """(p_o - p_e) / (1 - p_e) of two judges' verdicts on the same items, each verdict a category.

    p_o: share of items on which they agree; p_e: what it would be if each gave its verdicts by its own shares, blindly. Not a number
    where both give one and the same verdict throughout: chance alone agrees always.
    """
    n = len(first)
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, other = Counter(first), Counter(second)
    chance = sum(one[verdict] * other[verdict] for verdict in one) / n**2
    return math.nan if chance == 1.0 else (agree - chance) / (1.0 - chance)
