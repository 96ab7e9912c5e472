"""What is printed at the end of a run, by `status` and by `compare`, in 80 columns: no figure, name or command is cut."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from pipeline import compare_view, status, summary
from pipeline.console import Terminal
from pipeline.plan import State
from schemas.manifests import ShardRange, StageManifest, StagePlan, Tally
from stages.catalog import BY_NAME
from stages.compare.figures import Comparison, Selected
from stages.schedule import Step

WIDTH = 80


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the commands print on a terminal."""
    out = io.StringIO()
    for module in (compare_view, status, summary):
        monkeypatch.setattr(module, "Terminal", lambda: terminal(out))
    monkeypatch.setattr(summary, "tables_of", lambda *_: {})
    return out


def terminal(out: io.StringIO, **options: bool) -> Terminal:
    return Terminal(**{"file": out, "width": WIDTH, "force_terminal": True, "color_system": None} | options)


def test_the_conflict_of_many_languages_takes_several_tables(shown, tmp_path: Path, monkeypatch) -> None:
    codes = [f"l{n:02d}" for n in range(14)]
    cells = [(a, b, (i - j) / 20) for i, a in enumerate(codes) for j, b in enumerate(codes)]
    gram = pl.DataFrame(cells, schema=["language", "other", "cosine"], orient="row")
    frames = {"gram": gram.with_columns(scope=pl.lit("model"))}
    monkeypatch.setattr(summary, "_read", lambda folder, name, round_: frames.get(name))
    monkeypatch.setattr(summary, "states_of", lambda folder: [])
    summary.print_summary(SimpleNamespace(folder=tmp_path, banner=""))
    lines = shown.getvalue().split("Cosine", 1)[1].split("Look next", 1)[0].splitlines()[1:]
    assert max(map(len, lines)) <= WIDTH and "…" not in shown.getvalue()
    assert [code for line in lines if line.startswith("  ") for code in line.split()] == codes
    for code in codes:
        found = [cell for line in lines if line.startswith(code) for cell in line.split()[1:]]
        assert found == [f"{cosine:+.2f}" for one, _, cosine in cells if one == code]


def test_commands_and_paths_stay_in_one_piece(shown, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "a folder with a long name" / "and another one in it, which no terminal has room for"
    select = StageManifest.model_construct(stage="select", round=0, tallies=[], stats={})
    states = [SimpleNamespace(kind="done", manifest=select)]
    monkeypatch.setattr(summary, "states_of", lambda folder: states)
    summary.print_summary(SimpleNamespace(folder=folder, banner=""))
    lines = shown.getvalue().splitlines()
    assert f"Look next at: {folder}/report.html" in lines and f"  data:    congrad export '{folder}'" in lines

    why = f"There is no {folder}/x"
    waiting = State(Step(BY_NAME["pairs"], 0), "waiting", [f"congrad run '{folder}'"])
    monkeypatch.setattr(status, "states_of", lambda folder: [waiting])
    monkeypatch.setattr(status, "holder_of", lambda *_: {"pid": 1, "host": "h" * WIDTH})
    monkeypatch.setattr(status, "last_error", lambda *_: {"time": 0, "error": why})
    status.print_status(folder, as_json=False)
    lines = shown.getvalue().splitlines()
    assert f"Next: pairs (congrad run '{folder}')." in lines and any(line.endswith(f": {why}") for line in lines)
    assert f"Running now: process 1 on {'h' * WIDTH}." in lines


def states(failed: int = 0) -> list[State]:
    found = []
    for stage, round_, unit, rows, parts, seconds in (
        ("generate", 0, "prompt", 52_000, 416, 150_000.0),
        ("judge", 0, "candidate", 208_000, 960, 40.0),
        ("gradients", 0, "pair", 52_000, 416, 7_000.0),
        ("gradients", 1, "candidate", 208_000, 960, 150_000.0),
    ):
        tally = Tally(unit=unit, language="de", rows_in=rows, kept=rows - 7 - failed, dropped={"tie": 7}, failed=failed)
        common = {"stage": stage, "round": round_, "fingerprint": ""}
        plan = StagePlan(ingredients={}, shards=[ShardRange(n, n, n + 1) for n in range(parts)], **common)
        whole = StageManifest(content="", files=[], tallies=[tally], seconds=seconds, **common)
        committed = dict.fromkeys(range(parts), 1.0)
        found.append(State(Step(BY_NAME[stage], round_), "done", [], plan, whole, committed))
    return [*found, State(Step(BY_NAME["precondition"], 1), "waiting", ["it waits"])]


@pytest.mark.parametrize("failed", [0, 1_234])
def test_status_leaves_out_columns_before_it_cuts_a_figure(failed: int) -> None:
    out = io.StringIO()
    status.print_states(states(failed), terminal(out))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= WIDTH and "…" not in text
    for whole in (
        "gradients (round 1)", "precondition (round 1)", "416/416", "960/960", "52,000 prompts", "208,000 candidates",
        f"{208_000 - 7 - failed:,} ", "41 h 40 min", "117 min", "40 s",
    ):  # fmt: skip
        assert whole in text
    assert ("1,234" in text) == ("failed" in text) == bool(failed)


def test_status_shows_all_it_has_where_nobody_looks() -> None:
    out = io.StringIO()
    status.print_states(states(), terminal(out, force_terminal=False))
    assert "failed" in out.getvalue() and "5,200" in out.getvalue() and "e+" not in out.getvalue()


def comparison(arms: int) -> Comparison:
    kinds = [f"swapped_by_annotators_of_the_{group}_group" for group in ("first", "second")]
    counts = dict.fromkeys(kinds, 1_234_567)
    names = [f"arm {n}" for n in range(arms)]
    chosen = [
        Selected(name, (), 1_000_000 + n, {"de": 12_345_678}, counts, {}, dict.fromkeys(names, 0.5), 7, [])
        for n, name in enumerate(names)
    ]
    return Comparison(12_345_678, 12_345_678, {}, {"de": 12_345_678}, counts, {}, chosen)


def test_arms_stand_side_by_side_only_where_all_counts_fit(shown, monkeypatch) -> None:
    compare_view.print_comparison(comparison(7), as_json=False)
    text = shown.getvalue()
    tables = text.split("\n\n")[1:]
    assert len(tables) > 1 and max(len(line) for table in tables for line in table.splitlines()) <= WIDTH
    assert "…" not in text and all(f"{1_000_000 + n:,}" in text for n in range(7))
    for table in tables:
        labels = "".join(line[:26].rstrip() for line in table.splitlines())
        assert "_first_group" in labels and "_second_group" in labels

    out = io.StringIO()
    monkeypatch.setattr(compare_view, "Terminal", lambda: terminal(out, force_terminal=False))
    compare_view.print_comparison(comparison(20), as_json=False)
    lines = out.getvalue().split("\n\n")[1].splitlines()
    assert "\n\n" not in out.getvalue().split("\n\n", 1)[1], "one table"
    (kept,) = [line for line in lines if line.startswith("pairs kept")]
    assert kept.split()[3:] == [f"{1_000_000 + n:,}" for n in range(20)]
