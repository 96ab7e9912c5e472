"""Progress: the total is the work there is, the first news comes soon, and the time left is right."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from rich.text import Text

from pipeline.console import StageBar, _Patient
from pipeline.pace import Pace
from pipeline.plan import Inputs
from pipeline.run_stage import shard_work
from schemas import files
from schemas.config import RunConfig
from schemas.manifests import ShardRange, StagePlan
from stages.catalog import BY_NAME


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("loading", [0.0, 60.0, 600.0])
def test_after_a_tenth_of_the_work_the_time_left_is_right_however_long_the_model_took_to_load(clock, loading):
    pace = Pace()
    pace.expect(200, "pairs")
    clock[0] += loading
    for _ in range(5):  # batches of 4 in 8 s
        clock[0] += 8
        pace.advance(4)
    truth = 180 / 4 * 8
    assert pace.seconds_left == pytest.approx(truth, rel=0.3)


def test_work_of_an_earlier_run_is_not_taken_for_speed(clock):
    pace = Pace()
    pace.expect(1000, "pairs", done=900)
    assert pace.seconds_left is None
    for _ in range(2):
        clock[0] += 10
        pace.advance(10)
    assert pace.seconds_left == pytest.approx(80)


def test_a_stage_without_news_says_within_ten_seconds_that_it_is_at_work(clock, capsys):
    with StageBar(_Patient(stderr=True), "gradients") as bar:
        bar.total(700, "rows")
        for _ in range(10):
            clock[0] += 1
            bar.tick()
        assert "gradients: at work, 0 of 700 rows in 9 s" in capsys.readouterr().err
        for _ in range(50):
            clock[0] += 1
            bar.tick()
        assert capsys.readouterr().err == ""


def test_on_a_terminal_too_a_batch_that_takes_minutes_is_said_to_be_at_work(clock):
    out = io.StringIO()
    with StageBar(Console(file=out, force_terminal=True, width=160), "gradients") as bar:
        bar.total(700, "rows")
        bar.advance(7, {"tokens_per_s": 3.0})
        for _ in range(40):
            clock[0] += 1
            bar.tick()
        bar._live.refresh()
        assert "3 tokens/s  at work for 40 s" in Text.from_ansi(out.getvalue()).plain
        bar.advance(7, {"tokens_per_s": 2.0})
        out.truncate(0)
        bar._live.refresh()
        assert "at work" not in Text.from_ansi(out.getvalue()).plain


def test_the_total_of_gradients_is_the_pairs_that_get_one(tmp_path: Path):
    pl.DataFrame({"split": ["train", "test", "train", "dev", "train"]}).write_parquet(tmp_path / "part.parquet")
    inputs = Inputs({"pairs": [files.record(tmp_path, tmp_path / "part.parquet", "pairs", 5)]})
    shards = [ShardRange(index=0, start=0, stop=3), ShardRange(index=1, start=3, stop=5)]
    plan = StagePlan(stage="gradients", round=0, fingerprint="f", ingredients={}, shards=shards)
    given = {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "m"},
        "prompts": {"sources": [{"path": "x"}]},
    }
    config, trusting = (
        RunConfig.model_validate(given | {"conflict": {"target": target}}) for target in ("train", "dev")
    )
    assert shard_work(BY_NAME["gradients"], config, plan, tmp_path, inputs) == {0: 2, 1: 1}
    assert shard_work(BY_NAME["gradients"], trusting, plan, tmp_path, inputs) == {0: 2, 1: 2}
    assert shard_work(BY_NAME["generate"], config, plan, tmp_path, inputs) == {0: 3, 1: 2}
