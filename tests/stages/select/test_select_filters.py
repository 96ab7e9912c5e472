"""Every filter against its definition computed in plain Python."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import polars as pl
import pytest

from schemas.config.curation import SelectConfig
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
    return pl.DataFrame(rows, schema={"pair_id": pl.String, "language": pl.String, **COLUMNS})


def literal(row: dict[str, Any], by: str) -> float:
    return {
        "conflict": row["score"],
        "margin": row["chosen_score"] - row["rejected_score"],
        "implicit": row["implicit_margin"],
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


@pytest.mark.parametrize("by", sorted(set(FILTERS) - {"random", "mid_band"}))
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
