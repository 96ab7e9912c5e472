"""fork on a run of imported pairs: nothing dear is repeated, and neither run can damage the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from pipeline.existing import config_of
from pipeline.export import export_dataset
from pipeline.fork import fork
from pipeline.rundir import RunDir
from pipeline.status import states_of
from schemas.errors import UserError
from schemas.manifests import FileRecord
from stages.catalog import BY_NAME
from tests.faults.inline import InlineExecutor


@pytest.fixture
def run(imported_run: Path) -> Path:
    return imported_run


def _records(run: Path) -> list[FileRecord]:
    states = [json.loads(path.read_text()) for path in run.rglob("_state/*/_stage.json")]
    return [FileRecord(**file) for state in states for file in state["files"]]


def _kept(run: Path) -> set[str]:
    return set(pl.read_parquet(run / "round-0" / "curated" / "*.parquet")["pair_id"])


def test_a_fork_with_another_share_repeats_no_gradient_and_selects_as_a_run_of_its_own(
    run, inline_command, tmp_path
) -> None:
    said = inline_command("fork", str(run), str(tmp_path / "less"), "--set", "select.keep=0.3").stdout
    assert "gradients" in said.split("To do:")[0] and "select (select.keep: 0.5 -> 0.3)" in said
    gradients = Path("round-0/gradients/part-00000.parquet")
    assert (run / gradients).stat().st_ino == (tmp_path / "less" / gradients).stat().st_ino  # one file, no copy
    inline_command("run", str(tmp_path / "less" / "run.yaml"), "--until", "select")
    assert {title for title, _ in InlineExecutor.computed} == {"select"}
    assert _kept(tmp_path / "less") < _kept(run)
    assert config_of(tmp_path / "less").select.keep == 0.3 and config_of(run).select.keep == 0.5


def test_deleting_or_redoing_in_one_run_leaves_the_other_whole(run, inline_command, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(run, one)
    fork(one, two, [])
    assert not [bad for bad in RunDir(two).verify(_records(two))]
    inline_command("run", str(one / "run.yaml"), "--run-dir", str(tmp_path), "--set", "name=one", "--set", "gradients.sketch.seed=9", "--force-stage", "gradients", "--until", "select")  # fmt: skip
    RunDir(one).clear(BY_NAME["pairs"], 0)
    assert not RunDir(two).verify(_records(two))  # whatever was redone, set aside or deleted in the other
    shutil.rmtree(one)
    inline_command("run", str(two / "run.yaml"), "--dry-run")
    assert not RunDir(two).verify(_records(two))


def test_a_finished_model_is_copied_since_libraries_write_into_such_files(run, tmp_path) -> None:
    forked = fork(run, tmp_path / "copy", ["evaluate.pairs_per_language=2"])
    models = [file for file in _records(tmp_path / "copy") if file.table is None]
    assert forked.copied == sum(file.bytes for file in models) > 0
    assert not any((run / file.path).samefile(tmp_path / "copy" / file.path) for file in models)


def test_what_cannot_be_shared_safely_is_refused(run, tmp_path) -> None:
    with pytest.raises(UserError, match="There is something already"):
        fork(run, tmp_path, [])
    with pytest.raises(UserError, match="did you mean 'keep'"):
        fork(run, tmp_path / "new", ["select.kep=0.1"])
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    part = damaged / "round-0/pairs/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="no longer what was written"):
        fork(damaged, tmp_path / "new", [])
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}  # nothing half-made


def _copied(run: Path, other: Path, **changed: object) -> Path:
    """The run's policy in another folder, with values of its config changed."""
    shutil.copytree(yaml.safe_load((run / "run.yaml").read_text())["model"]["policy"], other)
    config = other / "config.json"
    if changed:
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    return other


def test_another_model_shares_nothing_that_was_made_with_the_old_one(run, tmp_path) -> None:
    other = _copied(run, tmp_path / "other", initializer_range=0.5)
    forked = fork(run, tmp_path / "new", [f"model.policy={other}"])
    assert forked.shared == []  # pairs too were measured with its tokenizer
    same = fork(run, tmp_path / "same", [f"model.policy={_copied(run, tmp_path / 'copy')}"])
    assert [state.step.title for state in same.left] == ["evaluate"]  # the same model in another place


def test_another_model_of_one_role_leaves_alone_what_has_no_such_role(run, tmp_path) -> None:
    other = _copied(run, tmp_path / "other", initializer_range=0.5)
    titles = [
        {state.step.title for state in fork(run, tmp_path / name, settings).shared}
        for name, settings in (
            ("plain", []),
            ("judge", ["evaluate.win_rate=true", "evaluate.prompts_per_language=1", f"model.evaluation_judge={other}"]),
            ("reference", [f"model.reference={other}"]),
        )
    ]
    assert titles[0] == titles[1] >= {"pairs", "gradients", "train"} and titles[2] == {"pairs"}


def test_a_model_that_is_named_otherwise_is_seen_until_a_run_has_looked_at_it(run, inline_command, tmp_path) -> None:
    mine, other = tmp_path / "mine", _copied(run, tmp_path / "other", initializer_range=0.5)
    fork(run, mine, [])
    command = ("run", str(mine / "run.yaml"), "--until", "pairs", "--set")
    same = _copied(run, tmp_path / "same")
    inline_command(*command, f"model.policy={same}")
    kinds = {state.step.title: state.kind for state in states_of(mine)}
    assert (
        kinds["pairs"] == "done" and kinds["gradients"] == "changed"
    )  # of the same content: only pairs were looked at
    inline_command("run", str(mine / "run.yaml"), "--until", "select")
    assert {state.kind for state in states_of(mine) if state.step.title in ("pairs", "gradients", "select")} == {"done"}
    before = yaml.safe_load((mine / "run.yaml").read_text())
    before["model"]["policy"] = str(other)
    (mine / "run.yaml").write_text(yaml.safe_dump(before))
    assert {state.kind for state in states_of(mine) if state.step.title == "gradients"} == {"changed"}
    with pytest.raises(UserError, match=r"not current: .*made with other settings"):
        export_dataset(config_of(mine), tmp_path / "given", None, None, False)


def test_without_hard_links_files_are_copied(run, tmp_path, monkeypatch) -> None:

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    forked = fork(run, tmp_path / "new", [])
    assert forked.linked == 0 and forked.copied and not RunDir(tmp_path / "new").verify(_records(tmp_path / "new"))
