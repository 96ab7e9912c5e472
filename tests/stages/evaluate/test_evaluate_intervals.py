"""Intervals against published values, closed forms and invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stages.evaluate.intervals import bootstrap, interval, wilson


def test_wilson_matches_the_roots_of_its_defining_equation() -> None:
    """The ends solve |p - share| = z sqrt(p (1 - p) / n)."""
    for share, n in ((0.8, 10), (0.5, 7), (0.03, 200)):
        for end in wilson(share, n):
            assert abs(end - share) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 5)[0] == 0.0 and wilson(1.0, 5)[1] == 1.0


def test_shares_get_wilson_and_half_values_the_bootstrap() -> None:
    groups = [f"g{i}" for i in range(10)]
    assert interval([1.0] * 8 + [0.0] * 2, groups, 0) == wilson(0.8, 10)
    halves = [1.0] * 7 + [0.5] + [0.0] * 2
    assert interval(halves, groups, 3) == bootstrap(halves, groups, 3)


def test_the_bootstrap_of_a_large_sample_is_the_normal_interval() -> None:
    values = list(np.random.default_rng(0).normal(2.0, 3.0, 2000))
    low, high = bootstrap(values, [str(i) for i in range(2000)], 1)
    half = 1.96 * np.std(values) / math.sqrt(2000)
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.1 * half)


def test_translations_of_a_task_do_not_narrow_the_interval() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    groups = [f"g{i}" for i in range(8)]
    assert bootstrap(values * 3, groups * 3, 5) == pytest.approx(bootstrap(values, groups, 5))


def test_equal_seeds_give_equal_intervals_and_too_little_gives_none() -> None:
    values, groups = [0.5, 1.0, 0.0], ["a", "b", "c"]
    assert interval(values, groups, 1) == interval(values, groups, 1)
    assert interval([1.0], ["a"], 0) is None and interval([1.0, 0.0], ["a", "a"], 0) is None


def test_a_unanimous_share_over_translations_is_not_certain() -> None:
    low, high = interval([1.0] * 12, ["a", "b", "c"] * 4, 0) or (0.0, 0.0)
    assert high == 1.0 and low == pytest.approx(wilson(1.0, 3)[0])
