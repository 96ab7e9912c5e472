from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config.curation import SelectConfig
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.select.stage import Select, rank


def config(seen: tuple[str, ...] = ("en", "de"), seed: int = 0, **select: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "seed": seed,
        "languages": {"seen": list(seen)},
        "model": {"policy": "none", "reference": "other"},
        "prompts": {"sources": [{"path": "package:prompts/{language}.jsonl"}]},
        "select": select,
    }


def pair(name: str, language: str = "en", split: str = "train", margin: float | None = 1.0) -> dict[str, Any]:
    return {
        "pair_id": name,
        "round": 0,
        "prompt_id": f"prompt {name}",
        "group_id": f"group {name}",
        "language": language,
        "split": split,
        "prompt": [{"role": "user", "content": f"question {name}"}],
        "chosen": [{"role": "assistant", "content": f"good {name}"}],
        "rejected": [{"role": "assistant", "content": f"bad {name}"}],
        "chosen_score": None if margin is None else 2.0 + margin,
        "rejected_score": None if margin is None else 2.0,
        "source": "s",
    }


def tables(pairs: list[dict[str, Any]], scores: dict[str, float | None]) -> dict[str, pa.Table]:
    languages = {row["pair_id"]: row["language"] for row in pairs}
    empty = {"cosines": [], "conflicting_languages": [], "norm": 1.0, "weight": 0.5, "gradient_norm": 0.5, "flags": []}
    empty |= {"implicit_margin": 0.0, "logp_margin": 0.0, "n_tokens": 4}
    rows = [{"pair_id": name, "language": languages[name], "score": score, **empty} for name, score in scores.items()]
    return {
        "pairs": pa.Table.from_pylist(pairs, schema=TABLES["pairs"].schema),
        "scores": pa.Table.from_pylist(rows, schema=TABLES["scores"].schema),
    }


def kept(outcome: Any) -> list[str]:
    return [row["pair_id"] for row in outcome.rows("curated")]


def many(n: int = 30) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    rng = random.Random(0)
    pairs = [pair(f"{language}{i:02}", language, margin=rng.random()) for i in range(n) for language in ("en", "de")]
    return pairs, {row["pair_id"]: rng.uniform(-1, 1) for row in pairs}


def test_the_top_share_of_each_language_is_kept_and_the_rest_has_reasons(run_stage: Callable[..., Any]) -> None:
    pairs, scores = many()
    scores["en00"] = None
    del scores["de00"]
    pairs += [pair("dev", split="dev"), pair("unseen", "th", "unseen")]
    outcome = run_stage(Select(), config(keep=0.3), **tables(pairs, scores))
    for language in ("en", "de"):
        scored = {name: s for name, s in scores.items() if name.startswith(language) and s is not None}
        best = sorted(scored, key=lambda name: -scored[name])[:9]
        assert [name for name in kept(outcome) if name.startswith(language)] == sorted(best)
        tally = outcome.tally("pair", language)
        assert (tally.rows_in, tally.kept, tally.dropped) == (30, 9, {"below_cut": 20, "no_score": 1})
    rejected = {row["pair_id"]: row for row in outcome.rows("rejected")}
    assert rejected["en00"]["reason"] == rejected["de00"]["reason"] == "no_score"
    assert {row["pair_id"]: row["conflict_score"] for row in outcome.rows("curated")}.items() <= scores.items()
    assert len(kept(outcome)) + len(rejected) == 60 == len({*kept(outcome), *rejected})
    assert {drop.row_id: drop.reason for drop in outcome.drops} == {n: row["reason"] for n, row in rejected.items()}


def test_ties_go_by_pair_id_and_a_language_keeps_at_least_one(run_stage: Callable[..., Any]) -> None:
    pairs = [pair(name) for name in ("c", "a", "b")] + [pair("x", "de")]
    outcome = run_stage(Select(), config(keep=0.1), **tables(pairs, dict.fromkeys("abcx", 0.5)))
    assert kept(outcome) == ["a", "x"]


def test_a_global_quota_warns_about_starvation(run_stage: Callable[..., Any]) -> None:
    pairs, _ = many(10)
    scores = {row["pair_id"]: float(row["language"] == "en") + i / 100 for i, row in enumerate(pairs)}
    outcome = run_stage(Select(), config(keep=0.5, quota="global"), **tables(pairs, scores))
    assert sorted(kept(outcome)) == [f"en{i:02}" for i in range(10)]
    assert any("starves de: 0 of 10 pairs kept, 50% would be 5" in note for note in outcome.notes)


def test_margin_ranks_by_judge_scores_on_the_same_pool(run_stage: Callable[..., Any]) -> None:
    pairs = [pair("a", margin=3.0), pair("b", margin=2.0), pair("c", margin=1.0), pair("d", margin=None)]
    scores = {"a": None, "b": -1.0, "c": 1.0, "d": 1.0}
    outcome = run_stage(Select(), config(by="margin", keep=0.5), **tables(pairs, scores))
    assert kept(outcome) == ["b", "c"] and outcome.rows("curated")[0]["conflict_score"] == 2.0
    assert {row["pair_id"]: row["reason"] for row in outcome.rows("rejected")} == {"a": "no_score", "d": "no_score"}


@pytest.mark.parametrize("quota", ["language", "global"])
@pytest.mark.parametrize(("known", "want"), [(8, 5), (5, 5), (2, 2)])
def test_a_ranking_that_knows_less_keeps_as_many_as_conflict_or_says_how_many_it_cannot(
    known: int, want: int, quota: str, run_stage: Callable[..., Any]
) -> None:
    """Ten pairs of a language with a conflict score, judge scores for some of them."""
    pairs = [pair(f"{i}", margin=1.0 + i if i < known else None) for i in range(10)]
    scores = {row["pair_id"]: 0.1 for row in pairs}
    plain = run_stage(Select(), config(keep=0.5, quota=quota), **tables(pairs, scores))
    assert len(kept(plain)) == 5 and not any("cannot rank" in note for note in plain.notes)
    outcome = run_stage(Select(), config(by="margin", keep=0.5, quota=quota), **tables(pairs, scores))
    assert len(kept(outcome)) == want
    said = f"margin cannot rank {10 - known} of 10 pairs with a conflict score"
    more = "as many are kept all the same" if want == 5 else f"{want} pairs are kept instead of 5"
    assert [note for note in outcome.notes if "cannot rank" in note] == [f"{said}: {more}"]


@pytest.mark.parametrize("quota", ["language", "global"])
def test_a_language_of_which_nothing_can_be_ranked_is_named(quota: str, run_stage: Callable[..., Any]) -> None:
    pairs = [
        pair(f"{code}{i}", code, margin=1.0 + i if code == "en" else None) for i in range(6) for code in ("en", "de")
    ]
    scores = {row["pair_id"]: 0.1 for row in pairs}
    outcome = run_stage(Select(), config(by="margin", keep=0.5, quota=quota), **tables(pairs, scores))
    assert "nothing is kept of de (6 pairs): margin cannot rank any of them" in outcome.notes


@pytest.mark.parametrize(
    ("n", "keep", "count"), [(50, 0.29, 15), (100, 0.145, 15), (10, 0.35, 4), (10, 0.25, 3), (9, 0.5, 5)]
)
def test_halves_are_rounded_up_whatever_binary_numbers_make_of_the_share(n: int, keep: float, count: int) -> None:
    frame = pl.DataFrame(
        {"pair_id": [f"{i:03}" for i in range(n)], "language": "en", "used": [float(i) for i in range(n)]}
    )
    assert rank(frame, SelectConfig(keep=keep))["reason"].null_count() == count


@pytest.mark.parametrize(("high", "starved"), [(1, True), (2, True), (3, False)])
def test_a_language_starves_that_keeps_less_than_half_of_its_own_share(
    high: int, starved: bool, run_stage: Callable[..., Any]
) -> None:
    """Of ten pairs 5 would be kept: 3 are enough, 2 are not."""
    pairs, _ = many(10)
    scores = {}
    for row in pairs:
        number = int(row["pair_id"][2:])
        scores[row["pair_id"]] = (0.5 if row["language"] == "en" else 1.0 if number < high else 0.0) + number / 1000
    outcome = run_stage(Select(), config(keep=0.5, quota="global"), **tables(pairs, scores))
    assert sum(name.startswith("de") for name in kept(outcome)) == high
    assert any("starves de" in note for note in outcome.notes) == starved


def test_random_depends_on_the_seed_alone(run_stage: Callable[..., Any]) -> None:
    pairs, scores = many()
    one = run_stage(Select(), config(by="random"), **tables(pairs, scores))
    turned = tables(pairs[::-1], {name: -(score or 0) for name, score in scores.items()})
    assert sorted(kept(one)) == sorted(kept(run_stage(Select(), config(by="random"), **turned)))
    other = run_stage(Select(), config(by="random", seed=1), **tables(pairs, scores))
    assert len(kept(other)) == len(kept(one)) == 30 and kept(other) != kept(one)


def test_no_ranking_at_all_is_an_error_that_says_what_is_missing(run_stage: Callable[..., Any]) -> None:
    pairs = [pair("a", margin=None)]
    with pytest.raises(UserError, match="no training pair has a conflict score"):
        run_stage(Select(), config(), **tables(pairs, {"a": None}))
    with pytest.raises(UserError, match=r"no judge scores.*fields\.chosen_score"):
        run_stage(Select(), config(by="margin"), **tables(pairs, {"a": 1.0}))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["en", "de", "sw"]), st.one_of(st.none(), st.integers(-3, 3))),
        min_size=1,
        max_size=30,
    ),
    st.floats(0.01, 1.0),
    st.sampled_from(["language", "global"]),
)
def test_rank_agrees_with_plain_sorting(rows: list[tuple[str, int | None]], keep: float, quota: Any) -> None:
    names = [f"{i:02}" for i in range(len(rows))]
    frame = pl.DataFrame(
        {"pair_id": names, "language": [row[0] for row in rows], "used": [row[1] for row in rows]},
        schema={"pair_id": pl.String, "language": pl.String, "used": pl.Float64},
    )
    ranked = rank(frame, SelectConfig(keep=keep, quota=quota))
    expected = set()
    for group in (["en"], ["de"], ["sw"]) if quota == "language" else (["en", "de", "sw"],):
        members = [
            (-row[1], name) for name, row in zip(names, rows, strict=True) if row[0] in group and row[1] is not None
        ]
        if members:
            expected |= {name for _, name in sorted(members)[: max(1, math.floor(keep * len(members) + 0.5))]}
    assert set(ranked.filter(pl.col("reason").is_null())["pair_id"]) == expected
    assert ranked["pair_id"].to_list() == names
    assert [reason == "no_score" for reason in ranked["reason"]] == [row[1] is None for row in rows]


def test_curated_loads_into_datasets_and_trl_trains_on_it_as_it_is(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any
) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    outcome = run_stage(Select(), config(), **tables(*many(4)))
    pq.write_table(outcome.tables["curated"], tmp_path / "curated.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "curated.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.to_list() == outcome.rows("curated") and len(loaded) == 4
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = trl.DPOTrainer(str(tiny_model), args=args, train_dataset=loaded, processing_class=tiny_tokenizer)
    assert len(trainer.train_dataset) == 4
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-3)


def test_both_tables_are_readable_with_every_row_accounted_for(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run_stage(Select(), config(keep=1.0), **tables(*many(4)))
    assert outcome.tables["rejected"].num_rows == 0 and outcome.tables["curated"].num_rows == 8
    pq.write_table(outcome.tables["rejected"], tmp_path / "rejected.parquet")
    assert pl.read_parquet(tmp_path / "rejected.parquet").columns == TABLES["rejected"].schema.names


@pytest.mark.parametrize(
    ("by", "column", "sign"),
    [
        ("mean_direction", "score_mean", 1),
        ("own_language", "cosine_own", 1),
        ("other_languages", "score_others", 1),
        ("logp_margin", "logp_margin", 1),
        ("implicit", "implicit_margin", 1),
        ("shortest", "n_tokens", -1),
        ("longest", "n_tokens", 1),
        ("bottom", "score", -1),
    ],
)
def test_every_baseline_ranks_by_its_own_column(by: str, column: str, sign: int, run_stage: Callable[..., Any]) -> None:
    pairs, scores = many(10)
    given_tables = tables(pairs, scores)
    rng = random.Random(3)
    values = {row["pair_id"]: rng.randint(1, 10**6) for row in pairs}
    if by == "bottom":
        values = {name: score or 0.0 for name, score in scores.items()}
    else:
        rows = [row | {column: values[row["pair_id"]]} for row in given_tables["scores"].to_pylist()]
        given_tables["scores"] = pa.Table.from_pylist(rows, schema=TABLES["scores"].schema)
    outcome = run_stage(Select(), config(by=by, keep=0.3), **given_tables)
    for language in ("en", "de"):
        mine = sorted((p for p in values if p.startswith(language)), key=lambda p: -sign * values[p])[:3]
        assert [p for p in kept(outcome) if p.startswith(language)] == sorted(mine)


def test_an_implicit_reward_that_is_zero_is_refused_in_the_stage(run_stage: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="logp_margin"):
        run_stage(Select(), config(by="implicit"), **tables(*many(4)))


def test_a_filter_that_ranks_pairs_against_each_other_sees_the_pool_alone(run_stage: Callable[..., Any]) -> None:
    """Pairs that the gate held back have implicit rewards, which would move the middle and the scale."""
    names = [f"p{i:02}" for i in range(20)]
    away = [f"q{i:02}" for i in range(20)]
    pairs = [pair(name, margin=1 + i) for i, name in enumerate(names + away)]
    found = []
    for there in (names, names + away):
        given = tables(
            [row for row in pairs if row["pair_id"] in there], {name: 0.1 if name in names else None for name in there}
        )
        margins = pa.array([float(i + 1) if name in names else 1000.0 for i, name in enumerate(there)])
        place = given["scores"].schema.get_field_index("implicit_margin")
        given["scores"] = given["scores"].set_column(place, "implicit_margin", margins)
        outcome = run_stage(Select(), config(("en",), by="lossdiff_irm", keep=0.3), **given)
        found.append(kept(outcome))
    assert found[0] == found[1] and len(found[0]) == 6
