from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pairs.length_control import extremes, fit_cost

MATRIX = st.integers(1, 12).flatmap(
    lambda prompts: st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60)), min_size=3, max_size=3),
        min_size=prompts,
        max_size=prompts,
    )
)


def matrices(cells: list[list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(cells, dtype=float)
    return array[..., 0] / 4, array[..., 1]


def mean_difference(score: np.ndarray, tokens: np.ndarray, cost: float, min_margin: float) -> float | None:
    """By plain loops: mean of len(chosen) - len(rejected) over the prompts that give a pair."""
    differences = []
    for scores, lengths in zip(score, tokens, strict=True):
        adjusted = [s - cost * n for s, n in zip(scores, lengths, strict=True)]
        best, worst = adjusted.index(max(adjusted)), adjusted.index(min(adjusted))
        if adjusted[best] - adjusted[worst] >= min_margin and adjusted[best] > adjusted[worst]:
            differences.append(lengths[best] - lengths[worst])
    return float(np.mean(differences)) if differences else None


@settings(max_examples=100, deadline=None)
@given(MATRIX, st.sampled_from([-0.05, 0.0, 0.125]), st.sampled_from([0.0, 0.5]))
def test_choice_agrees_with_plain_loops(cells: list, cost: float, min_margin: float) -> None:
    score, tokens = matrices(cells)
    choice = extremes(score, tokens, cost)
    rows = np.flatnonzero(choice.pairs(min_margin))
    found = [tokens[i, choice.best_P[i]] - tokens[i, choice.worst_P[i]] for i in rows]
    assert (float(np.mean(found)) if found else None) == mean_difference(score, tokens, cost, min_margin)


def test_missing_candidates_are_never_chosen() -> None:
    score = np.array([[np.nan, 2.0, 1.0], [3.0, 3.5, np.nan]])
    choice = extremes(score, np.ones((2, 3)))
    assert choice.best_P.tolist() == [1, 1] and choice.worst_P.tolist() == [2, 0]


def test_ties_go_to_the_first_candidate_and_equal_scores_are_no_pair() -> None:
    choice = extremes(np.array([[4.0, 4.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), np.ones((2, 4)))
    assert (choice.best_P[0], choice.worst_P[0]) == (0, 2)
    assert choice.pairs(0.0).tolist() == [True, False]


@pytest.mark.parametrize("slope", [0.05, -0.03])
def test_the_fitted_cost_evens_out_lengths_and_finds_the_planted_slope(slope: float) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, size=(600, 4)).astype(float)
    score = slope * tokens + rng.normal(size=tokens.shape)
    assert abs(mean_difference(score, tokens, 0.0, 0.1)) > 50
    cost, excess, *_ = fit_cost(score, tokens, 0.1)
    assert abs(mean_difference(score, tokens, cost, 0.1)) < 1.0
    assert excess == pytest.approx(mean_difference(score, tokens, cost, 0.1))
    assert cost == pytest.approx(slope, rel=0.1)


@settings(max_examples=100, deadline=None)
@given(MATRIX, st.sampled_from([0.0, 0.5]))
def test_control_never_makes_the_length_difference_larger(cells: list, min_margin: float) -> None:
    score, tokens = matrices(cells)
    cost, *_ = fit_cost(score, tokens, min_margin)
    before, after = (mean_difference(score, tokens, c, min_margin) or 0.0 for c in (0.0, cost))
    assert abs(after) <= abs(before) + 1e-9


def test_with_margins_in_standard_deviations_the_cost_is_fitted_to_the_pairs_that_are_kept() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, 200, size=(400, 4)).astype(float)
    score = 40 * (0.05 * tokens + rng.normal(size=tokens.shape))
    cost, excess, *_ = fit_cost(score, tokens, 1.0, in_sd=True)
    least = float(np.std(score - cost * tokens))
    assert least > 10
    assert excess == pytest.approx(mean_difference(score, tokens, cost, least))
    assert abs(mean_difference(score, tokens, cost, least)) < 3.0


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_a_judge_that_follows_length_alone_does_not_lose_its_pairs(noise: float) -> None:
    """At the cost that cancels the length no two answers lie a margin apart: no pair is no balance."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(10, 200, size=(40, 4)).astype(float)
    found = fit_cost(tokens / 40 + noise * rng.normal(size=tokens.shape), tokens, 0.1)
    choice = extremes(tokens / 40, tokens, 0.0)
    assert found.before == choice.pairs(0.1).sum() == 40 and 20 <= found.pairs <= 40
    assert fit_cost(np.array([[3.0, 2.0]]), np.array([[40.0, 20.0]]), 0.1).pairs == 1
