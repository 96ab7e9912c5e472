"""explain on a whole run: every training pair has an answer that agrees with the tables."""

from __future__ import annotations

import json

import polars as pl
import pytest


def test_a_pair_of_a_real_run_is_explained_by_a_prefix_of_its_id(whole_run, inline_command):
    _, run, _ = whole_run
    scores = pl.read_parquet(run / "round-0" / "scores" / "*.parquet").drop_nulls("score")
    pair_id, score = scores["pair_id"][0], scores["score"][0]
    done = inline_command("explain", str(run), pair_id[:16], "--json", "--neighbours", "3")
    found = json.loads(done.stdout)
    assert found["pair_id"] == pair_id and found["scores"]["score"] == score
    total = sum(group["contribution"] for group in found["conflict"]["layer_groups"])
    assert total == pytest.approx(score, abs=1e-5)
    kept = pl.read_parquet(run / "round-0" / "curated" / "*.parquet")["pair_id"].to_list()
    assert found["selection"]["kept"] == (pair_id in kept)
    assert len(found["conflict"]["nearest"]) == 3
    text = inline_command("explain", str(run), pair_id)
    assert f"Pair {pair_id}" in text.stdout and "Where the score comes from" in text.stdout


def test_an_unknown_id_says_how_to_list_pairs(whole_run, inline_command):
    _, run, _ = whole_run
    done = inline_command("explain", str(run), "zzz", check=False)
    assert done.exit_code == 1 and "inspect RUN pairs" in done.stderr and "Traceback" not in done.stderr
