"""A run that fails everywhere stops and says why; a worker that hangs is replaced; what memory taught is kept."""

from __future__ import annotations

import json

import polars as pl
import pytest
from test_pipeline_run import fake, quick, titles

from schemas.errors import UserError
from tests.crews import over_both_crews

__all__ = ["fake", "quick"]


def events(fake, name: str) -> list[dict]:
    lines = (fake.root / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def asked(fake) -> int:
    return len(events(fake, "part_done"))


def test_a_stage_that_fails_everywhere_ends_the_run_and_says_what_and_how_often(fake, tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(UserError) as caught:
        fake("prompts.max_chars=200")
    text = str(caught.value)
    assert "Stage generate: " in text and "engine_error: no answer 1" in text
    assert "more than the 10% that execution.max_failed_fraction allows" in text
    assert "most often (1" in text, "answers that differ only in digits count as one"
    assert asked(fake) < 1 + 67, "it stops before the last shard"


def test_after_the_cause_is_gone_the_failed_parts_and_only_they_are_made_anew(quick, tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="max_failed_fraction"):
        quick("execution.max_failed_fraction=0.45")
    (tmp_path / "fail").unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (quick.root / "round-0/candidates").iterdir()}
    quick("execution.max_failed_fraction=0.45")
    rows = pl.read_parquet(quick.root / "round-0/candidates/*.parquet")
    assert sorted(rows["n_tokens"]) == [n * n for n in range(0, 20, 2)]
    dropped = pl.read_parquet(quick.root / "round-0/_dropped/candidates/*.parquet")
    assert dropped.filter(pl.col("failed")).height == 3, "parts with one of three rows failed are under 45%"
    untouched = [n for n, t in kept.items() if (quick.root / "round-0/candidates" / n).stat().st_mtime_ns == t]
    assert len(untouched) == 3


def test_a_share_within_the_limit_goes_on_and_the_failed_rows_are_accounted_for(quick, tmp_path):
    (tmp_path / "fail").touch()
    assert "select" in titles(quick("execution.max_failed_fraction=0.5").ran)
    again = quick()
    assert again.ran == [], "a limit lowered after a finished stage changes nothing"


@over_both_crews
def test_a_worker_without_progress_is_ended_and_replaced(fake, tmp_path):
    (tmp_path / "hang-2").touch()
    fake("execution.watchdog_minutes=0.15", last="generate")
    assert sorted(pl.read_parquet(fake.root / "round-0/candidates/*.parquet")["n_tokens"].to_list()) == [
        n * n for n in range(0, 20, 2)
    ]
    assert any("watchdog" in event["message"] for event in events(fake, "note"))


def test_what_memory_taught_a_worker_holds_for_later_stages(fake, tmp_path):
    (tmp_path / "no-room").touch()
    fake(last="select")
    assert any(event["message"] == "limits {'generate.size': 7}" for event in events(fake, "note"))
