"""Known errors against a plain count, and the ranking's AUROC against every pair of pairs."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest

from stages.compare.known_errors import known_errors, sentences


def _tables(folder: Path, seed: int, n: int = 200) -> tuple[pl.DataFrame, dict[str, list[Path]]]:
    """n pairs with coarse scores (ties), some without a score, some held out; 30% are kept."""
    rng = random.Random(seed)
    frame = pl.DataFrame(
        {
            "pair_id": f"p{i}",
            "language": rng.choice(["en", "de"]),
            "split": "test" if i % 10 == 0 else "train",
            "label_error": rng.choice(["", "", "", "flip", "off_topic"]),
            "conflict_score": rng.randint(0, 20) / 10 if i % 7 else None,
        }
        for i in range(n)
    ).with_columns(kept=pl.Series([rng.random() < 0.3 for _ in range(n)]))
    frame = frame.with_columns(kept=pl.col("kept") & pl.col("conflict_score").is_not_null())
    files = {name: [folder / f"{name}.parquet"] for name in ("pairs", "curated", "rejected")}
    frame.select("pair_id", "language", "split", "label_error").write_parquet(files["pairs"][0])
    train = frame.filter(split="train")
    for name, kept in (("curated", True), ("rejected", False)):
        train.filter(kept=kept).select("pair_id", "language", "conflict_score").write_parquet(files[name][0])
    return frame, files


@pytest.mark.parametrize("seed", range(3))
def test_found_errors_are_those_that_are_not_curated(tmp_path: Path, seed: int) -> None:
    frame, files = _tables(tmp_path, seed)
    in_pairs = dict(frame.group_by("label_error").len().iter_rows())
    stats = {
        "label_error flip": in_pairs["flip"] + 3.0,
        "label_error off_topic": float(in_pairs["off_topic"]),
        "other": 1.0,
    }
    found = {one.kind: one for one in known_errors(files["pairs"], files["curated"], files["rejected"], stats)}
    train = frame.filter(split="train")
    share = train["kept"].mean()
    for kind, dropped in (("flip", 3), ("off_topic", 0)):
        mine, one = train.filter(label_error=kind), found[kind]
        assert (one.total, one.before, one.kept) == (mine.height + dropped, dropped, mine["kept"].sum())
        assert one.found == dropped + (~mine["kept"]).sum()
        assert one.chance == pytest.approx(dropped + mine.height * (1 - share))
        assert sum(one.deciles) == mine["conflict_score"].count()
        wins = [
            (good > bad) + 0.5 * (good == bad)
            for language in ("en", "de")
            for bad in mine.filter(language=language)["conflict_score"].drop_nulls()
            for good in train.filter(language=language, label_error="")["conflict_score"].drop_nulls()
        ]
        assert one.above == pytest.approx(sum(wins) / len(wins))
    said = sentences(list(found.values()))
    assert f"Found {found['flip'].found} of {found['flip'].total} known errors of the kind flip" in " ".join(said)


def test_a_perfect_ranking_puts_every_error_in_the_last_tenths(tmp_path: Path) -> None:
    frame, files = _tables(tmp_path, 0)
    for name in ("curated", "rejected"):
        rows = pl.read_parquet(files[name][0]).join(frame.select("pair_id", "label_error"), on="pair_id")
        best = pl.when(pl.col("label_error") == "flip").then(-1.0).otherwise(1.0)
        rows.with_columns(conflict_score=best).drop("label_error").write_parquet(files[name][0])
    (one,) = known_errors(files["pairs"], files["curated"], files["rejected"], {"label_error flip": 50.0})
    assert one.above == 1.0 and sum(one.deciles[:5]) == 0


def test_a_kind_that_is_held_out_whole_is_not_told(tmp_path: Path) -> None:
    _, files = _tables(tmp_path, 0)
    held = pl.read_parquet(files["pairs"][0]).with_columns(
        split=pl.when(pl.col("label_error") == "flip").then(pl.lit("test")).otherwise("split")
    )
    held.write_parquet(files["pairs"][0])
    total = float(held.filter(label_error="flip").height)
    assert (
        sentences(known_errors(files["pairs"], files["curated"], files["rejected"], {"label_error flip": total})) == []
    )


def test_data_that_says_nothing_has_no_known_errors(tmp_path: Path) -> None:
    _, files = _tables(tmp_path, 0)
    assert known_errors(files["pairs"], files["curated"], files["rejected"], {"neutralised_marks": 4.0}) == []
