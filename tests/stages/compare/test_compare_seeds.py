"""Means over seeds against scipy's t interval, and differences seed by seed."""

from __future__ import annotations

import random

import polars as pl
import pytest

from stages.compare.seeds import Mean, mean_of, over_seeds


@pytest.mark.parametrize("n", [2, 3, 7, 31, 32, 60, 400])
def test_the_interval_is_students(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(n)
    values = [rng.gauss(0.7, 0.1) for _ in range(n)]
    found = mean_of(values)
    low, high = stats.t.interval(0.95, n - 1, loc=stats.tmean(values), scale=stats.sem(values))
    assert (found.mean, found.seeds) == (pytest.approx(sum(values) / n), n)
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_one_seed_has_no_interval() -> None:
    assert (mean_of([0.25]).low, mean_of([0.25]).high) == (None, None)
    assert mean_of([0.25] * 3) == Mean(0.25, None, None, 3)  # an untrained model, once a seed


def rows(values: dict[str, dict[int, float | None]]) -> pl.DataFrame:
    keys = {"split": "test", "language": "all", "metric": "accuracy", "n": 40}
    found = [{"arm": arm, "seed": seed, "value": v} | keys for arm, by in values.items() for seed, v in by.items()]
    return pl.DataFrame(found, schema_overrides={"value": pl.Float64})


def test_what_a_seed_does_to_both_arms_cancels_in_the_difference() -> None:
    found = over_seeds(rows({"ours": {0: 0.5, 1: 0.9, 2: 0.1}, "random": {2: 0.0, 0: 0.4, 1: 0.8}}))
    ours, random_ = found.to_dicts()
    assert ours["difference"] is None and ours["seeds"] == 3
    assert all(random_[name] == pytest.approx(-0.1) for name in ("difference", "difference_low", "difference_high"))
    assert random_["high"] - random_["low"] > 1  # the seeds themselves differ


def test_missing_seeds_and_values_are_left_out() -> None:
    found = over_seeds(rows({"ours": {0: 0.5, 1: None}, "other": {1: 0.25, 2: 0.75}})).to_dicts()
    assert [(one["arm"], one["seeds"], one["difference"]) for one in found] == [("ours", 1, None), ("other", 2, None)]
    assert over_seeds(rows({"a": {0: None}})).is_empty()
