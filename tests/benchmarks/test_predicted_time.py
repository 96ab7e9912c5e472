"""The checker of predicted times reads what a run's own events say."""

from __future__ import annotations

import json

import pytest

from benchmarks.predicted_time import foreseen
from pipeline.events import Events, Meter


def test_the_first_word_after_a_tenth_is_compared_with_what_the_stage_took(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", lambda: now[0])
    log = Events(tmp_path / "events.jsonl")
    log.add("stage_started", stage="gradients", round=0)
    meter = Meter(log, "gradients", 0)
    meter.total(400, "rows", done=100)
    now[0] += 60  # loading
    for batch in range(30):
        now[0] += 4 if batch < 5 else 8
        meter.advance(10, {})
    log.add("stage_done", stage="gradients", round=0)
    log.add("stage_started", stage="select", round=0)
    now[0] += 30
    log.add("stage_done", stage="select", round=0)
    gradients, select = foreseen(json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert gradients.took == 60 + 5 * 4 + 25 * 8 and gradients.share == pytest.approx(0.1)
    assert gradients.foreseen == 60 + 12 + 27 * 4 and gradients.off == pytest.approx(180 / 280 - 1)
    assert select.off is None and select.took == 30
