"""Curves of merging and projecting, and what objectives in sequence did to one another."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from schemas.tables import TABLES
from stages.report.curves import curves
from stages.report.data import Tables
from stages.report.objectives import objectives

NAMES = ["help/ful", "harmless", "truthful"]
LOGGED: dict[int, dict[str, float]] = {
    1: {"loss": 0.69, "merge/delta_norm": 0.2, "merge/pull_norm": 0.1, "merge/cosine": -0.3, "merge/alpha_sum": 0.01},
    2: {"loss": 0.6, "merge/delta_norm": 0.1, "merge/pull_norm": 0.1, "merge/projected": 0.75, "merge/alpha": 0.01},
    4: {
        "objective/help/ful/reward_accuracy": 0.9,
        "objective/help/ful/accuracy": 0.6,
        "objective/help/ful/directions": 12.5,
        "objective/help/ful/energy": 0.95,
    },
    8: {
        "objective/help/ful/reward_accuracy": 0.8,
        "objective/harmless/reward_accuracy": 1.0,
        "objective/harmless/leak": 1e-7,
        "objective/harmless/leak_exported": 0.031,
    },
}


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    rows = [{"step": step, "name": name, "value": v} for step, logged in LOGGED.items() for name, v in logged.items()]
    frame = pl.from_arrow(TABLES["metrics"].schema.empty_table())
    assert isinstance(frame, pl.DataFrame)
    pl.DataFrame(rows, schema=frame.schema).write_parquet(tmp_path / "metrics.parquet")
    return Tables({"metrics:0": [tmp_path / "metrics.parquet"]})


def test_step_and_pull_share_a_panel_and_nothing_is_shown_twice(tables: Tables) -> None:
    found = curves(tables, 0)
    assert found is not None
    panels = {panel.title: panel for panel in found.chain}
    both = panels["AdamW's step and the pull on it"]
    assert (both.line, both.and_) == ("|δ|", "|a τ|") and (both.first, both.last) == ("0.200", "0.100")
    assert both.chart.count("line-kept") == 1 == both.chart.count("line-dropped0")
    assert panels["Share of the update left by the projection"].last == "75%"
    assert "Entries of opposite sign" not in panels  # was not logged
    assert [name for name, _, _ in found.others] == ["merge/alpha"]


def test_a_row_after_each_objective_with_what_became_of_the_earlier_ones(tables: Tables) -> None:
    found = objectives(tables, 0, NAMES)
    assert found is not None
    first, second = found.rows
    assert (first.name, first.step, first.rewards) == ("help/ful", 4, [0.9, None, None])
    assert (first.directions, first.energy, first.leak, first.exported) == (12.5, 0.95, None, None)
    assert second.rewards == [0.8, 1.0, None] and (second.leak, second.exported) == (1e-7, 0.031)
    assert [(name, low, high) for name, low, high, _ in found.panels] == [
        ("help/ful", "90%", "80%"),
        ("harmless", "100%", "100%"),
    ]
    assert objectives(tables, 0, []) is None and objectives(Tables({}), 0, NAMES) is None
