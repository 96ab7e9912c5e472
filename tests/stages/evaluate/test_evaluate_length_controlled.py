"""The win rate at equal length, against scipy's minimizer of the penalised likelihood written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from stages.evaluate.intervals import of_statistic
from stages.evaluate.length_controlled import length_controlled
from stages.evaluate.metrics import Measurement, evaluation_table
from stages.text.repetition import repetition


def test_it_is_the_intercept_of_the_regression() -> None:
    """To 1e-6, ties included."""
    generator = np.random.default_rng(0)
    for n in (5, 40, 300):
        d_N = generator.normal(30, 200, n)
        w_N = np.round(generator.random(n) * 0.8 + 0.3 * (d_N > 0), 0).clip(0, 1)
        w_N[::7] = 0.5
        x_N = np.tanh(d_N / d_N.std())

        def loss(theta: np.ndarray, w_N: np.ndarray = w_N, x_N: np.ndarray = x_N) -> float:
            z_N = theta[0] + theta[1] * x_N
            return float((np.logaddexp(0, z_N) - w_N * z_N).sum() + theta[1] ** 2 / 2)

        a = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x[0]
        assert length_controlled(w_N, d_N) == pytest.approx(1 / (1 + np.exp(-a)), abs=1e-6)


def test_a_judge_of_length_alone_is_seen_through_and_equal_lengths_change_nothing() -> None:
    d_N = np.array([200.0] * 600 + [-200.0] * 200)
    wins = ((d_N > 0) ^ (np.arange(800) % 5 == 0)).astype(float)  # follows the length four times of five
    assert wins.mean() == 0.65 and abs(length_controlled(wins, d_N) - 0.5) < 0.02
    assert length_controlled([1, 1, 0, 0.5], [0.0] * 4) == pytest.approx(0.625, abs=1e-8)
    assert length_controlled([1.0] * 5, [1, 2, 3, 4, 5]) == 1.0


def test_over_all_languages_lengths_count_in_what_is_much_in_their_language() -> None:
    """Characters of some scripts say three times as much as those of others: in one unit their lengths would be no lengths."""
    generator = np.random.default_rng(1)
    items = []
    for language, unit in (("en", 600.0), ("zh", 60.0)):
        for n, d in enumerate(generator.normal(unit / 2, unit, 400)):
            won = generator.random() < 1 / (1 + np.exp(-1.5 * d / unit))  # even at equal length
            items.append(Measurement("after", "test", language, "win_rate", f"{language}{n}", float(won), float(d)))
    table = evaluation_table(items, (), seed=0).to_pylist()
    found = {row["language"]: row["value"] for row in table if row["metric"] == "win_rate_length_controlled"}
    assert min(found["en"], found["zh"]) - 0.02 < found["all"] < max(found["en"], found["zh"]) + 0.02


def test_its_interval_resamples_whole_groups_and_needs_eight() -> None:
    values = [float(n % 3 == 0) for n in range(30)]
    groups = [str(n // 2) for n in range(30)]

    def mean(chosen: list[int]) -> float:
        return float(np.mean([values[n] for n in chosen]))

    low, high = of_statistic(mean, groups, 3)
    assert low < 1 / 3 < high and (low, high) == of_statistic(mean, groups, 3)
    assert of_statistic(mean, ["a"] * 30, 3) is None


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("", 0, 0),
        ("The Rhine runs through Basel and Cologne.", 0, 0),
        ("ha " * 200, 0.9, 1),
        ("水は酸素と水素からできている。" * 40, 0.9, 1),
    ],
)
def test_repetition_is_seen_in_any_script(text: str, low: float, high: float) -> None:
    assert low <= repetition(text) <= high
