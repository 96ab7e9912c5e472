"""events.jsonl and `status` tell a machine what happened: stable names, rates, the last error, exit codes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from test_pipeline_run import fake, quick
from typer.testing import CliRunner

from pipeline import events as events_module
from pipeline.cli import app
from pipeline.events import Events, Meter
from pipeline.executor_errors import Interrupted, StageFailed, ending
from pipeline.history import last_error, progress
from pipeline.status import _progress_line
from schemas.errors import UserError

__all__ = ["fake", "quick"]

DOCUMENTED = Path(__file__).parents[2] / "docs" / "events.md"


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def status(folder: Path) -> dict:
    result = CliRunner().invoke(app, ["status", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def documented() -> dict[str, set[str]]:
    """Event -> the words in backticks of its row in docs/events.md."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", DOCUMENTED.read_text(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", keys)) for name, keys in rows}


def test_every_event_of_a_run_and_every_key_is_documented(fake):
    with pytest.raises(UserError):
        fake("generate.candidates=13")
    fake("generate.candidates=4", force=("generate",))
    seen = events(fake.root)
    assert {event["event"] for event in seen} >= {
        "run_started",
        "stage_started",
        "part_done",
        "stage_done",
        "run_ended",
    }
    for event in seen:
        assert set(event) - {"time", "event"} <= documented()[event["event"]], event


def test_rows_of_events_balance(quick):
    quick()
    for event in events(quick.root):
        for row in event.get("rows", []):
            assert row["in"] == row["kept"] + sum(row["dropped"].values()) + row["failed"]
    done = next(e for e in events(quick.root) if e["event"] == "stage_done" and e["stage"] == "generate")
    assert done["rows"] == [{"unit": "prompt", "in": 20, "kept": 10, "dropped": {"odd": 10}, "failed": 0}]


def test_the_last_error_is_in_status_until_a_run_ends_well(quick):
    with pytest.raises(UserError):
        quick("generate.candidates=13")
    found = status(quick.root)
    assert found["last_error"]["kind"] == "user" and found["last_error"]["exit_code"] == 1
    assert found["last_error"]["error"].startswith("thirteen is not a number of candidates")
    assert found["next"]["stage"] == "generate" and not found["done"] and found["running"] is None
    text = CliRunner().invoke(app, ["status", str(quick.root)], env={"COLUMNS": "250"}).output
    assert "Last error (" in text and "thirteen" in text
    quick("generate.candidates=4", force=("generate",))
    found = status(quick.root)
    assert found["last_error"] is None and found["done"] and found["next"] is None
    text = CliRunner().invoke(app, ["status", str(quick.root)], env={"COLUMNS": "250"}).output
    assert "rows/s" in text and "Last error" not in text


def test_a_run_that_was_killed_is_told_from_one_that_is_at_work(tmp_path):
    Events(tmp_path / "events.jsonl").add("run_started", stages=["generate"])
    assert last_error(tmp_path, running=True) is None
    assert last_error(tmp_path, running=False)["kind"] == "killed"
    assert last_error(tmp_path / "nothing", running=False) is None


def test_lines_that_are_not_whole_are_left_out(tmp_path):
    log = Events(tmp_path / "events.jsonl")
    log.add("run_ended", **ending(UserError("full disk")))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "no\n[1, 2]\n')
    assert last_error(tmp_path, running=False)["error"] == "full disk."


def test_endings_carry_the_exit_codes_of_the_command_line(tmp_path):
    assert ending(UserError("x"))["exit_code"] == 1
    assert ending(StageFailed("generate", "m", "", tmp_path)) | {"error": ""} == {
        "ok": False, "error": "", "kind": "defect", "exit_code": 2,
    }  # fmt: skip
    assert ending(Interrupted(signal.SIGTERM))["exit_code"] == 143
    assert ending(Interrupted(signal.SIGINT))["kind"] == "stopped"


def test_progress_says_rate_and_time_left(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(events_module.time, "monotonic", lambda: now[0])
    meter = Meter(Events(tmp_path / "events.jsonl"), "generate", 0)
    meter.total(1000, "rows", done=400)
    meter.advance(50, {"tokens_per_s": 5.0})
    meter.tick()
    assert progress(tmp_path) is None, "not more than twice a minute"
    now[0] += 40
    meter.advance(50, {"tokens_per_s": 7.0}, "node-a GPU 1")
    found = progress(tmp_path)
    assert found | {"time": 0} == {
        "time": 0, "event": "progress", "stage": "generate", "round": 0, "before": 400, "done": 500, "total": 1000, "unit": "rows",
        "per_s": 1.25, "seconds_left": 400, "silent_s": 0, "rates": {"tokens_per_s": 7.0},
        "places": {"node-a GPU 1": {"done": 50, "per_s": 1.25}},
    }  # fmt: skip
    assert set(found) - {"time", "event"} <= documented()["progress"]
    Events(tmp_path / "events.jsonl").add("stage_done", stage="generate", round=0)
    assert progress(tmp_path) is None


def test_a_forward_that_takes_minutes_is_news_to_machines_and_to_status(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(events_module.time, "monotonic", lambda: now[0])
    meter = Meter(Events(tmp_path / "events.jsonl"), "gradients", 0)
    meter.total(300, "rows")
    silent = []
    for _ in range(100):
        now[0] += 1
        meter.tick()
        found = progress(tmp_path)
        if found is not None and found["silent_s"] not in silent:
            silent.append(found["silent_s"])
    assert silent == [9, 39, 69, 99]
    assert _progress_line(progress(tmp_path)) == "gradients: 0 of 300 rows; at work for 99 s since"


def test_when_a_tenth_is_done_the_prediction_is_written_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(events_module.time, "monotonic", lambda: now[0])
    meter = Meter(Events(tmp_path / "events.jsonl"), "gradients", 0)
    meter.total(300, "rows", done=100)
    for _ in range(8):
        now[0] += 1
        meter.advance(10, {})
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["done"] for line in lines] == [120]
