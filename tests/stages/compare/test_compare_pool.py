"""Selections on one pool: equal counts, and figures that a plain count over the same pairs gives too."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.compare.figures import Comparison, compared
from stages.compare.pool import Arm, on_one_pool, why_not
from stages.select.filters import FILTERS

LANGUAGES = ("en", "de", "sw")
_CHAT = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def config(**select: Any) -> RunConfig:
    values = {
        "name": "t",
        "languages": {"seen": list(LANGUAGES)},
        "model": {"policy": "m", "reference": "r"},
        "select": select,
    }
    return RunConfig.model_validate(values | {"pairs": {"sources": [{"path": "p.jsonl"}]}})


def tables(folder: Path, n: int = 60, seed: int = 0, without: tuple[str, ...] = ()) -> dict[str, list[Path]]:
    """Tables of n training pairs with random values, and one held-out pair; a third has no judge score."""
    rng = random.Random(seed)
    pairs, scores, gradients = [], [], []
    for i in range(n + 1):
        ids = {"pair_id": f"p{i:03}", "language": rng.choice(LANGUAGES)}
        texts = {side: [{"role": "user", "content": f"{side} {i}"}] for side in ("prompt", "chosen", "rejected")}
        judged = {side: rng.uniform(0, 5) if i % 3 else None for side in ("chosen_score", "rejected_score")}
        pairs.append(ids | {"split": "train" if i < n else "test", "criterion": None} | texts | judged)
        if i == n:
            continue
        values = (
            "score",
            "score_others",
            "score_mean",
            "cosine_own",
            "implicit_margin",
            "logp_margin",
            "gradient_norm",
        )
        scores.append(
            ids | {name: rng.uniform(-1, 1) for name in values} | {"n_tokens": rng.randint(4, 90), "flags": []}
        )
        lengths = {"n_chosen": rng.randint(1, 40), "n_rejected": rng.randint(1, 40)}
        gradients.append(ids | lengths | {"logp_chosen": rng.uniform(-9, -1), "logp_rejected": rng.uniform(-9, -1)})
    found = {}
    overrides = {side: _CHAT for side in ("prompt", "chosen", "rejected")} | {"criterion": pl.String}
    overrides |= {"flags": pl.List(pl.String)}  # type: ignore[dict-item]
    overrides |= {side: pl.Float64 for side in ("chosen_score", "rejected_score")}  # type: ignore[dict-item]
    for name, rows in {"pairs": pairs, "scores": scores, "gradients": gradients}.items():
        found[name] = [folder / f"{name}-{seed}.parquet"]
        pl.DataFrame(rows, schema_overrides=overrides).drop(without, strict=False).write_parquet(found[name][0])
    return found


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., tuple[Comparison, dict[str, list[Path]]]]:
    """Compare arms, given as name -> settings of `select`, on random tables."""

    def compare(arms: dict[str, dict[str, Any]], **made: Any) -> tuple[Comparison, dict[str, list[Path]]]:
        files = tables(tmp_path, **made)
        all_arms = [Arm(name, config(**select), files) for name, select in arms.items()]
        return compared(all_arms, on_one_pool(all_arms, 0), files, LANGUAGES, 2), files

    return compare


@pytest.mark.parametrize("quota", ["language", "global"])
@pytest.mark.parametrize(("keep", "n"), [(0.05, 1), (0.3, 60), (0.5, 31), (1.0, 12)])
def test_filters_keep_equally_many_of_one_pool(put, quota: str, keep: float, n: int) -> None:
    names = [name for name in FILTERS if "chosen_score" not in FILTERS[name].columns or n > 1]  # p000 is not judged
    found, files = put({name: {"by": name, "keep": keep, "quota": quota} for name in names}, n=n, seed=n)
    judged = pl.read_parquet(files["pairs"]).filter(split="train")
    if "margin" in names:
        judged = judged.drop_nulls("chosen_score")
    assert found.pool == judged.height and found.training == n
    assert len({arm.kept for arm in found.arms}) == 1
    if quota == "language":
        for language, count in judged.group_by("language").len().iter_rows():
            assert {arm.languages[language] for arm in found.arms} == {max(1, math.floor(count * keep + 0.5))}
    else:
        assert found.arms[0].kept == max(1, math.floor(found.pool * keep + 0.5))


def test_the_figures_are_those_of_a_plain_count(put) -> None:
    found, files = put({"ours": {"keep": 0.4}, "long": {"by": "longest", "keep": 0.4}, "all": {"keep": 1.0}})
    frame = pl.read_parquet(files["scores"]).join(pl.read_parquet(files["gradients"]), on="pair_id")
    kept = {}
    for name, value in (("ours", "score"), ("long", "n_tokens")):
        kept[name] = set()
        for language in LANGUAGES:
            rows = frame.filter(language=language).sort(value, "pair_id", descending=[True, False])
            kept[name] |= set(rows.head(math.floor(rows.height * 0.4 + 0.5))["pair_id"])
    kept["all"] = set(frame["pair_id"])
    for arm in found.arms:
        mine = frame.filter(pl.col("pair_id").is_in(list(kept[arm.name])))
        assert arm.kept == mine.height
        assert arm.means["length_difference"] == pytest.approx((mine["n_chosen"] - mine["n_rejected"]).mean())
        assert arm.means["likelihood"] == pytest.approx((mine["logp_chosen"] / mine["n_chosen"]).mean())
        assert "relevance" not in arm.means  # this run has no such columns
        for other, share in arm.overlap.items():
            both = len(kept[arm.name] & kept[other]) / min(len(kept[arm.name]), len(kept[other]))
            assert share == pytest.approx(both)
        others = set().union(*(ids for name, ids in kept.items() if name != arm.name))
        alone = kept[arm.name] - others
        assert arm.only == len(alone) and {e.pair_id for e in arm.examples} <= alone
        assert all(example.chosen == f"chosen {int(example.pair_id[1:])}" for example in arm.examples)


def test_relevance_is_shown_where_the_gradients_have_it(put, tmp_path: Path) -> None:
    files = tables(tmp_path)
    with_it = pl.read_parquet(files["gradients"]).with_columns(relevance_chosen=2.0, relevance_rejected=0.5)
    with_it.write_parquet(files["gradients"][0])
    arms = [Arm("ours", config(), files), Arm("random", config(by="random"), files)]
    found = compared(arms, on_one_pool(arms, 0), files, LANGUAGES, 0)
    assert found.arms[1].means["relevance"] == 2.0 and found.arms[1].means["relevance_margin"] == 1.5


def test_an_arm_that_can_rank_nothing_is_named(tmp_path: Path) -> None:
    files = tables(tmp_path)
    unjudged = pl.read_parquet(files["pairs"]).with_columns(chosen_score=pl.lit(None, pl.Float64))
    unjudged.write_parquet(files["pairs"][0])
    arms = [Arm("ours", config(), files), Arm("by judge", config(by="margin"), files)]
    with pytest.raises(UserError, match="by judge: no pair can be ranked: the pairs have no judge scores"):
        on_one_pool(arms, 0)
    assert why_not(arms[0], 0) == "" and "no judge scores" in why_not(arms[1], 0)


def test_arms_with_no_pair_in_common_are_refused(tmp_path: Path) -> None:
    one, other = tables(tmp_path, seed=1), tables(tmp_path, seed=2)
    for files, half in ((one, pl.col("pair_id") < "p030"), (other, pl.col("pair_id") >= "p030")):
        scores = pl.read_parquet(files["scores"]).with_columns(score=pl.when(half).then(pl.col("score")))
        scores.write_parquet(files["scores"][0])
    with pytest.raises(UserError, match="No pair can be ranked by all of one, other"):
        on_one_pool([Arm("one", config(), one), Arm("other", config(), one | {"scores": other["scores"]})], 0)
