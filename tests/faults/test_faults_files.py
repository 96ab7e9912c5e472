"""Parts and manifests that were truncated, edited, deleted, moved or written by another version."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.loop import preview
from pipeline.models import Models
from pipeline.plan import Step
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from schemas.errors import UserError
from schemas.manifests import FileRecord, StageManifest
from stages.catalog import BY_NAME

PART = "round-0/candidates/part-00001.parquet"
STATE = "round-0/_state/generate"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path) -> None:
    """What a person with a notebook does."""
    import polars as pl

    pl.read_parquet(path).with_columns(n_tokens=pl.lit(7, pl.Int32)).write_parquet(path)


@pytest.mark.parametrize("until", ["generate", None])
@pytest.mark.parametrize("damage", [truncate, flip, edit, os.unlink, lambda p: p.write_bytes(b"")])
def test_a_damaged_part_is_made_again_or_refused_and_never_read(fake, until, damage):
    fake(last=until)
    before = {name: data for name, data in fake.tables().items()}
    damage(fake.root / PART)
    try:
        fake(force=() if until else ("select",))
    except UserError as error:
        assert PART in str(error) and "Delete it and run again" in str(error)
        (fake.root / PART).unlink()
        fake()
    fake()
    after = fake.tables()
    assert all(after[name] == data for name, data in before.items() if name.endswith(".parquet"))


@pytest.mark.parametrize("content", [b"", b'{"version": 1, "stage": "gen', b"\x00" * 100])
@pytest.mark.parametrize("name", ["part-00001.json", "_stage.json"])
def test_a_torn_manifest_is_as_if_never_written(fake, name, content):
    fake(last="generate")
    before = fake.tables()
    (fake.root / STATE / name).write_bytes(content)
    fake(last="generate")
    assert fake.tables() == before
    assert [e for e in fake.computed if e[0] == "generate"].count(("generate", 0)) == 1, "only that part is made again"


def test_a_torn_plan_is_refused_by_name(fake):
    fake(last="generate")
    (fake.root / STATE / "plan.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"generate/plan\.json.*Delete the file"):
        fake()


@pytest.mark.parametrize("name", ["plan.json", "part-00000.json", "_stage.json"])
@pytest.mark.parametrize("extra", [{}, {"newer": 1}])
def test_manifests_of_a_newer_version_are_refused_even_if_their_fields_fit(fake, name, extra):
    fake(last="generate")
    path = fake.root / STATE / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2} | extra))
    if name == "part-00000.json":
        (fake.root / STATE / "_stage.json").unlink()
    with pytest.raises(UserError, match=rf"{name}.*another version.*--run-dir"):
        fake()


def test_parts_left_by_an_earlier_plan_do_not_stay_in_the_table(fake):
    """A crash while a stage was being cleared: its state is gone, its tables are not."""
    fake(last="generate")
    shutil.rmtree(fake.root / STATE)
    fake("generate.shard_size=10", last="generate")
    assert [p.name for p in (fake.root / "round-0/candidates").iterdir()] == ["part-00000.parquet"]
    assert [p.name for p in (fake.root / "round-0/_dropped/candidates").iterdir()] == ["part-00000.parquet"]


def test_a_file_of_the_users_in_a_table_folder_is_left_alone(fake):
    fake(last="prompts")
    (fake.root / "round-0/candidates").mkdir(parents=True)
    (fake.root / "round-0/candidates/notes.parquet").write_text("mine")
    fake()
    assert (fake.root / "round-0/candidates/notes.parquet").read_text() == "mine"


def test_a_moved_and_renamed_run_continues_where_it_was(fake):
    fake(last="generate")
    done = len(fake.computed)
    moved = fake.folder / "archive" / "renamed"
    moved.parent.mkdir()
    fake.root.rename(moved)
    states, _ = preview(load_config(fake.path, [f"run_dir={moved.parent}", "name=renamed"]), Selection())
    assert [state.kind for state in states[:2]] == ["done", "done"]
    fake(f"run_dir={moved.parent}", "name=renamed")
    assert [stage for stage, _ in fake.computed[done:]] == ["select", "train"]


def test_a_forced_stage_that_was_interrupted_continues_with_the_same_command(fake, monkeypatch):
    import fake_stages

    fake()
    fake.computed.clear()
    real = fake_stages.Squares.run

    def stopped(self, ctx, shards):
        for count, part in enumerate(real(self, ctx, shards)):
            if count == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(fake_stages.Squares, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        fake(force=("generate",))
    monkeypatch.setattr(fake_stages.Squares, "run", real)
    fake(force=("generate",))
    assert [part for stage, part in fake.computed if stage == "generate"] == [0, 1, 2], "begun anew once, not twice"
    fake(force=("generate",))
    assert [part for stage, part in fake.computed if stage == "generate"] == [0, 1, 2] * 2, "forced again: again"


def test_a_trained_model_that_was_damaged_is_never_loaded(tmp_path, fake):
    """Models reach a stage by folder, not as a table: their files are checked as well."""
    weights = fake.root / "round-0/train/model/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    record = FileRecord(path="round-0/train/model/model.safetensors", bytes=7, sha256="0" * 64)
    manifest = StageManifest(stage="train", round=0, fingerprint="f", content="c", files=[record], tallies=[])
    rundir = RunDir(fake.root)
    state = rundir.state(BY_NAME["train"], 0)
    state.mkdir(parents=True)
    (state / "_stage.json").write_text(manifest.model_dump_json())
    models = Models(load_config(fake.path, ["rounds=2"]), rundir)
    for stage, round_ in (("evaluate", 0), ("generate", 1), ("judge", 1), ("gradients", 1)):
        assert rundir.verify(models.files(Step(BY_NAME[stage], round_))) == [record] * (2 if stage == "x" else 1), stage
    assert models.files(Step(BY_NAME["generate"], 0)) == []
