"""The run loop on fake stages: complete, resumed, redone, refused; equal for any number of workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl
import pytest

import pipeline.local_crew
import pipeline.loop
import stages.schedule
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.executor_errors import StageFailed
from pipeline.lease import Lease
from pipeline.loop import preview
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from pipeline.status import states_of
from schemas.errors import UserError
from tests.crews import LIGHT_RAY, SETTINGS, over_both_crews
from tests.faults.inline import InlineExecutor

sys.path.insert(0, str(Path(__file__).parent))
import fake_stages

SPECS = (fake_stages.PROMPTS, fake_stages.GENERATE, fake_stages.SELECT, fake_stages.TRAIN)


@pytest.fixture
def fake(monkeypatch, tmp_path, write_config, crew):
    """Run the fake pipeline; returns a function (overrides, selection) -> outcome and the run directory."""
    monkeypatch.setattr(stages.schedule, "STAGES", SPECS)
    monkeypatch.setattr(pipeline.loop, "config_files", lambda spec, config: {})
    monkeypatch.setattr(pipeline.loop, "preflight", lambda config, specs: None)
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[2]}")
    if crew == "ray":
        monkeypatch.syspath_prepend(LIGHT_RAY)
    path = write_config(prompts={"sources": [{"path": "x"}], "max_chars": 20}, generate={"shard_size": 3})

    def run(*overrides: str, **selection: object) -> pipeline.loop.RunOutcome:
        config = load_config(path, (*SETTINGS[crew], *overrides))
        return pipeline.loop.run(config, Selection(**selection), Display(quiet=True))

    run.root = tmp_path / "runs" / "t"
    run.config = lambda *o: load_config(path, o)
    return run


@pytest.fixture
def quick(fake, monkeypatch):
    """The same without worker processes, of which every stage starts its own: for what is not about them."""
    InlineExecutor.computed = []
    monkeypatch.setattr(pipeline.local_crew, "local_executor", InlineExecutor)
    return fake


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.parquet"))}


def titles(steps) -> list[str]:
    return [s.title for s in steps]


def test_a_run_completes_and_running_again_does_nothing(fake):
    outcome = fake()
    assert titles(outcome.ran) == ["prompts", "generate", "select", "train"]
    assert pl.read_parquet(fake.root / "round-0/curated/*.parquet")["chosen_score"][0] == sum(
        n * n for n in range(0, 20, 2)
    )
    dropped = pl.read_parquet(fake.root / "round-0/_dropped/candidates/*.parquet")
    assert dropped["reason"].to_list() == ["odd"] * 10
    again = fake()
    assert again.ran == [] and len(again.skipped) == 4
    assert [s.kind for s in states_of(fake.root)] == ["done"] * 4


def test_table_folders_hold_only_parquet(quick):
    quick()
    for table in ("prompts", "round-0/candidates", "round-0/curated"):
        assert all(p.suffix == ".parquet" for p in (quick.root / table).iterdir())
    assert not list((quick.root / "_tmp").iterdir())


@pytest.mark.parametrize("workers", [2, 5])
def test_tables_do_not_depend_on_the_number_of_workers(fake, workers, tmp_path, monkeypatch):
    fake(f"execution.workers={workers}", last="generate")
    got = contents(fake.root)
    InlineExecutor.computed = []
    monkeypatch.setattr(pipeline.local_crew, "local_executor", InlineExecutor)
    fake(f"run_dir={tmp_path / 'alone'}", "execution.workers=1", last="generate")
    assert got == contents(tmp_path / "alone" / "t")


@over_both_crews
def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(fake, tmp_path):
    (tmp_path / "die-2").touch()
    (tmp_path / "die-5").touch()
    fake("execution.workers=2", last="generate")
    assert sorted(pl.read_parquet(fake.root / "round-0/candidates/*.parquet")["n_tokens"].to_list()) == [
        n * n for n in range(0, 20, 2)
    ]


@over_both_crews
def test_a_stage_whose_workers_keep_dying_ends_with_advice(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.pool._MAX_DEATHS", 1)
    (tmp_path / "die-0").touch()
    with pytest.raises(UserError, match=r"died.*same command continues"):
        fake(last="generate")
    assert [state.kind for state in states_of(fake.root)][:2] == ["done", "resume"]


def test_lost_part_is_made_again_and_nothing_else(quick):
    quick()
    before = contents(quick.root)
    victim = quick.root / "round-0/candidates/part-00003.parquet"
    victim.unlink()
    others = {p: p.stat().st_mtime_ns for p in victim.parent.iterdir()}
    outcome = quick()
    assert titles(outcome.ran) == ["generate"]
    assert contents(quick.root) == before
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_corrupted_part_is_never_read(quick):
    quick(last="generate")
    victim = quick.root / "round-0/candidates/part-00000.parquet"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00000\.parquet.*Delete it"):
        quick()
    victim.unlink()
    assert "select" in titles(quick().ran)


def test_changed_setting_redoes_a_cheap_stage_but_refuses_to_throw_away_an_expensive_one(quick):
    quick()
    with pytest.raises(UserError, match=r"train.*select\.keep: 0\.5 -> 0\.25.*--force-stage select"):
        quick("select.keep=0.25")
    outcome = quick("select.keep=0.25", force=("select",))
    assert titles(outcome.ran)[0] == "select" and "train" not in titles(outcome.ran)  # same sums: train is still valid


def test_rows_of_two_settings_never_mix(quick):
    quick(last="generate")
    with pytest.raises(UserError, match=r"generate\.candidates: 4 -> 5"):
        quick("generate.candidates=5")
    quick("generate.candidates=5", force=("generate",))
    prints = {json.loads(p.read_text())["fingerprint"] for p in (quick.root / "round-0/_state/generate").glob("*.json")}
    assert len(prints) == 1


@pytest.mark.parametrize("override", ["execution.workers=2", "train.micro_batch_size=1", "gradients.token_budget=100"])
def test_execution_settings_change_freely(quick, override):
    quick()
    assert quick(override).ran == []


@over_both_crews
def test_train_finds_its_folder_after_a_crash(fake, tmp_path):
    (tmp_path / "die-train").touch()
    fake()
    assert (fake.root / "round-0/train/result.txt").read_text() == "resumed"


@over_both_crews
def test_user_errors_arrive_whole_and_defects_name_the_log(fake):
    with pytest.raises(UserError, match=r"thirteen.*generate\.candidates"):
        fake("generate.candidates=13", last="generate")
    with pytest.raises(StageFailed, match=r"RuntimeError: a defect.*worker-"):
        fake("generate.candidates=14", force=("generate",))


def test_selection_of_stages(quick):
    assert titles(quick(last="generate").ran) == ["prompts", "generate"]
    assert titles(quick(stage="select").ran) == ["select"]
    with pytest.raises(UserError, match=r"no stage 'selct'.*select"):
        quick(stage="selct")


def test_a_stage_without_its_inputs_says_what_it_waits_for(quick):
    with pytest.raises(UserError, match=r"select cannot run.*waits for generate"):
        quick(stage="select")


def test_two_runs_on_one_directory_are_refused(quick):
    with Lease(quick.root), pytest.raises(UserError, match=r"Another run is working.*process"):
        quick()


def test_a_dead_holder_does_not_block(quick):
    quick.root.mkdir(parents=True)
    holder = Lease(quick.root)._me | {"pid": 2**22 - 1, "started": 1, "nonce": "x", "heartbeat": 9e9}
    (quick.root / "_lease.json").write_text(json.dumps(holder))
    assert quick(last="prompts").ran


def test_dry_run_changes_nothing(quick):
    states, _ = preview(quick.config(), Selection())
    assert [s.kind for s in states] == ["new", "waiting", "waiting", "waiting"]
    assert not (quick.root / "prompts").exists()


def test_manifest_of_a_newer_version_is_refused(quick):
    quick(last="prompts")
    path = quick.root / "_state/prompts/_stage.json"
    path.write_text(
        path.read_text().replace('"version": 1', '"version": 99').replace('"stage"', '"newer": 1, "stage"', 1)
    )
    with pytest.raises(UserError, match=r"_stage\.json.*another version"):
        quick()


def test_every_level_accounts_for_every_row(quick):
    quick()
    rundir = RunDir(quick.root)
    for spec in SPECS[:3]:
        manifest = rundir.stage(spec, 0)
        assert manifest is not None
        for t in manifest.tallies:
            assert t.rows_in == t.kept + sum(t.dropped.values()) + t.failed
    assert rundir.stage(fake_stages.GENERATE, 0).tallies[0].dropped == {"odd": 10}


def test_the_report_is_written_after_every_run_and_again_only_when_it_is_missing_or_old(quick):
    quick(last="generate")
    page = quick.root / "report.html"
    first = page.read_bytes()
    quick()
    second = page.read_bytes()
    assert second != first
    page.unlink()
    assert quick().ran == [] and page.read_bytes() == second
    before = page.stat().st_mtime_ns
    quick()
    assert page.stat().st_mtime_ns == before
    page.write_bytes(first)
    quick()
    assert page.read_bytes() == second


def test_a_run_directory_with_the_report_as_a_stage_continues(quick):
    quick(last="select")
    state = quick.root / "_state" / "report"
    state.mkdir()
    (state / "plan.json").write_text('{"of": "another time"}')
    assert titles(quick().ran) == ["train"]
    with pytest.raises(UserError, match="no stage 'report'"):
        quick(stage="report")
