"""Intervals against published values, closed forms and invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stages.evaluate.intervals import bootstrap, interval, of_changes, wilson


def test_wilson_matches_the_roots_of_its_defining_equation() -> None:
    """The ends solve |p - share| = z sqrt(p (1 - p) / n)."""
    for share, n in ((0.8, 10), (0.5, 7), (0.03, 200)):
        for end in wilson(share, n):
            assert abs(end - share) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 5)[0] == 0.0 and wilson(1.0, 5)[1] == 1.0


def test_shares_get_wilson_and_half_values_the_bootstrap() -> None:
    groups = [f"g{i}" for i in range(10)]
    assert interval([1.0] * 8 + [0.0] * 2, groups, 0, share=True) == wilson(0.8, 10)
    halves = [1.0] * 7 + [0.5] + [0.0] * 2
    assert interval(halves, groups, 3, share=True) == bootstrap(halves, groups, 3)


def test_the_bootstrap_of_a_large_sample_is_the_normal_interval() -> None:
    values = list(np.random.default_rng(0).normal(2.0, 3.0, 2000))
    low, high = bootstrap(values, [str(i) for i in range(2000)], 1)
    half = 1.96 * np.std(values) / math.sqrt(2000)
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.1 * half)


def test_translations_of_a_task_do_not_narrow_the_interval() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    groups = [f"g{i}" for i in range(8)]
    assert bootstrap(values * 3, groups * 3, 5) == pytest.approx(bootstrap(values, groups, 5))


def test_equal_seeds_give_equal_intervals() -> None:
    values, groups = [0.5, 1.0, 0.0] * 4, [f"g{i}" for i in range(12)]
    assert interval(values, groups, 1, True) == interval(values, groups, 1, True) == bootstrap(values, groups, 1)


def test_few_groups_get_the_cautious_interval_or_none() -> None:
    values, groups = [0.75, 0.8, 0.7], ["a", "b", "c"]
    assert interval(values, groups, 0, share=False) is None
    assert interval([1.0], ["a"], 0, True) is None and interval([1.0, 0.0], ["a", "a"], 0, True) is None
    assert interval([1.0, 1.0, 0.0, 0.5], ["a", "a", "b", "b"], 0, share=True) == wilson(0.625, 2)


def test_changes_that_are_all_alike_are_not_certain() -> None:
    groups = [f"g{i}" for i in range(8)]
    half = wilson(0.0, 8)[1]
    assert of_changes([0.0] * 8, groups, 0) == (-half, half) and of_changes([0.5] * 8, groups, 0) == (
        0.5 - half,
        0.5 + half,
    )
    assert of_changes([0.0], ["g"], 0) is None and of_changes([0.0, 1.0], ["g", "h"], 0) is None
    mixed = [0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert of_changes(mixed, groups, 3) == bootstrap(mixed, groups, 3)


@pytest.mark.parametrize("change", [1.0, -1.0, 0.5])
def test_a_share_changes_by_no_more_than_one(change: float) -> None:
    low, high = of_changes([change] * 2, ["g", "h"], 0) or (9.0, 9.0)
    half = wilson(0.0, 2)[1]
    assert (low, high) == (max(-1.0, change - half), min(1.0, change + half)) and -1 <= low <= change <= high <= 1
    assert of_changes([3.0] * 2, ["g", "h"], 0) == (3.0 - half, 3.0 + half)  # of what is no share


def test_unanimous_shares_are_not_certain() -> None:
    groups = [f"g{i}" for i in range(10)] * 2
    assert interval([1.0] * 20, groups, 0, share=True) == wilson(1.0, 10)
    assert interval([0.5] * 20, groups, 0, share=True) == wilson(0.5, 10)


def test_a_change_that_is_nowhere_has_no_width_and_is_not_a_share() -> None:
    assert interval([0.0] * 10, [f"g{i}" for i in range(10)], 0, share=False) == (0.0, 0.0)
