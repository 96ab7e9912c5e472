"""Every filter against its definition computed in plain Python."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import polars as pl
import pytest

from schemas.config.curation import BY_IMPLICIT_REWARDS, SelectConfig
from schemas.errors import UserError
from stages.select.filters import FILTERS, ranking

COLUMNS = {
    "score": pl.Float64,
    "score_others": pl.Float64,
    "score_mean": pl.Float64,
    "cosine_own": pl.Float64,
    "implicit_margin": pl.Float64,
    "logp_margin": pl.Float64,
    "n_tokens": pl.Int64,
    "chosen_score": pl.Float64,
    "rejected_score": pl.Float64,
    "gradient_norm": pl.Float64,
}


def pairs(n: int = 40, seed: int = 0, **fixed: Any) -> pl.DataFrame:
    rng = random.Random(seed)
    rows = [
        {
            "pair_id": f"p{i:03}",
            "language": rng.choice(["en", "de", "sw"]),
            **{name: rng.randint(2, 99) if name == "n_tokens" else rng.uniform(-1, 1) for name in COLUMNS},
            **fixed,
        }
        for i in range(n)
    ]
    return pl.DataFrame(
        rows,
        schema={"pair_id": pl.String, "language": pl.String, **COLUMNS}
        | dict.fromkeys(fixed.keys() - COLUMNS.keys(), pl.String),
    )


def literal(row: dict[str, Any], by: str) -> float:
    return {
        "conflict": row["score"],
        "margin": row["chosen_score"] - row["rejected_score"],
        "implicit": row["implicit_margin"],
        "smallest_gap": -row["implicit_margin"],
        "logp_margin": row["logp_margin"],
        "mean_direction": row["score_mean"],
        "own_language": row["cosine_own"],
        "other_languages": row["score_others"],
        "shortest": -row["n_tokens"],
        "longest": row["n_tokens"],
        "bottom": -row["score"],
    }[by]


def test_the_config_knows_exactly_these_filters() -> None:
    assert set(get_args(SelectConfig.model_fields["by"].annotation)) == set(FILTERS)


ELSEWHERE = {"random", "mid_band", "medium_influence", "lossdiff_irm", "fused_margin"}
"""Tested below."""


@pytest.mark.parametrize("by", sorted(set(FILTERS) - ELSEWHERE))
def test_a_filter_is_its_definition(by: str) -> None:
    frame = pairs()
    assert ranking(frame, by).to_list() == [literal(row, by) for row in frame.iter_rows(named=True)]


def test_the_middle_band_is_the_middle_of_each_language() -> None:
    scores = {"en": [5.0, 1.0, 3.0, 2.0, 4.0], "de": [-1.0, -3.0, -2.0]}
    frame = pl.DataFrame(
        [{"pair_id": f"{code}{s}", "language": code, "score": s} for code, values in scores.items() for s in values]
    )
    used = dict(zip(frame["pair_id"], ranking(frame, "mid_band"), strict=True))
    assert used["en3.0"] == used["de-2.0"] == 0.0
    assert used["en2.0"] == used["en4.0"] == -0.4
    assert used["en1.0"] == used["en5.0"] == -0.8
    assert used["de-1.0"] == used["de-3.0"] == pytest.approx(-2 / 3)


def test_random_is_a_seeded_order_that_nothing_else_decides() -> None:
    frame = pairs()
    assert ranking(frame, "random", (1, 0)).equals(ranking(pairs(score=0.5), "random", (1, 0)))
    assert not ranking(frame, "random", (1, 0)).equals(ranking(frame, "random", (2, 0)))
    assert not ranking(frame, "random", (1, 0)).equals(ranking(frame, "random", (1, 1)))


def test_nothing_to_go_by_is_null_and_never_nan() -> None:
    frame = pairs(4).with_columns(
        score=pl.Series([None, math.nan, 0.5, 0.1]), chosen_score=pl.lit(None, dtype=pl.Float64), language=pl.lit("en")
    )
    for by in ("conflict", "mid_band", "bottom"):
        assert ranking(frame, by).is_null().to_list() == [True, True, False, False], by
    assert ranking(frame, "margin").null_count() == 4


def test_a_reward_that_is_zero_everywhere_is_refused_and_says_what_to_use() -> None:
    with pytest.raises(UserError, match=r"policy is the reference.*logp_margin"):
        ranking(pairs(implicit_margin=0.0), "implicit")


def test_unknown_filters_and_missing_columns_are_named() -> None:
    with pytest.raises(UserError, match=r"no filter 'best'.*conflict.*bottom"):
        ranking(pairs(), "best")
    with pytest.raises(UserError, match="logp_margin"):
        ranking(pairs().drop("logp_margin"), "logp_margin")


def _nearness(values: list[float], value: float) -> float:
    """0 in the middle of the ranks, towards -1 at their ends."""
    return -abs(2 * (sorted(values).index(value) + 1) - len(values) - 1) / len(values)


def test_medium_influence_and_lossdiff_irm_are_the_middle_of_each_language() -> None:
    frame = pairs(seed=3)
    medium, both = (ranking(frame, name).to_list() for name in ("medium_influence", "lossdiff_irm"))
    rows = frame.to_dicts()
    for place, row in enumerate(rows):
        mine = [other for other in rows if other["language"] == row["language"]]
        influences = [other["score"] * other["gradient_norm"] for other in mine]
        near = _nearness(influences, row["score"] * row["gradient_norm"])
        reward = _nearness([other["implicit_margin"] for other in mine], row["implicit_margin"])
        assert medium[place] == pytest.approx(near) and both[place] == pytest.approx(min(near, reward))


def test_fused_margins_are_in_units_of_their_language() -> None:
    frame = pairs(seed=4)
    doubled = frame.with_columns(pl.col("implicit_margin") * 1000)
    assert ranking(frame, "fused_margin").to_list() == pytest.approx(ranking(doubled, "fused_margin").to_list())
    rows = frame.to_dicts()
    for row, value in zip(rows, ranking(frame, "fused_margin"), strict=True):
        mine = [other for other in rows if other["language"] == row["language"]]
        judged = [other["chosen_score"] - other["rejected_score"] for other in mine]
        implicit = [other["implicit_margin"] for other in mine]
        scale = [math.sqrt(sum(x * x for x in xs) / len(xs)) for xs in (judged, implicit)]
        want = (row["chosen_score"] - row["rejected_score"]) / scale[0] + row["implicit_margin"] / scale[1]
        assert value == pytest.approx(want)


def test_criteria_have_scales_of_their_own() -> None:
    one, other = pairs(seed=5, criterion="a"), pairs(seed=6, criterion="b").with_columns(pl.col("chosen_score") * 50)
    for by in ("fused_margin", "medium_influence"):
        apart = [*ranking(one, by), *ranking(other, by)]
        assert ranking(pl.concat([one, other]), by).to_list() == pytest.approx(apart)


def test_a_pair_without_a_value_costs_nobody_elses() -> None:
    frame = pairs(seed=7)
    for missing in (None, math.nan):
        holed = frame.with_columns(
            implicit_margin=pl.when(pl.col("pair_id") != "p005").then("implicit_margin").otherwise(missing)
        )
        for by in ("lossdiff_irm", "fused_margin"):
            ranked = ranking(holed, by)
            assert ranked.is_null().arg_true().to_list() == [5]


def test_the_config_knows_which_filters_go_by_implicit_rewards() -> None:
    assert set(BY_IMPLICIT_REWARDS) == {name for name, filter_ in FILTERS.items() if filter_.implicit}


@pytest.mark.parametrize("by", ["smallest_gap", "lossdiff_irm", "fused_margin"])
def test_what_goes_by_implicit_rewards_is_refused_where_all_are_zero(by: str) -> None:
    with pytest.raises(UserError, match="policy is the reference"):
        ranking(pairs(implicit_margin=0.0), by)
