"""`export --what model | adapter`: a folder that loads, with a card that is complete."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from huggingface_hub import ModelCard

import pipeline.export_model
from pipeline.commit import write_manifest
from pipeline.export_folder import MARK
from pipeline.export_model import export_model
from pipeline.fingerprint import content_of
from pipeline.plan import State
from pipeline.rundir import RunDir
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import StageManifest, StagePlan
from schemas.tables import TABLES
from stages.catalog import BY_NAME
from stages.schedule import Step
from tests.pipeline.hub_server import hub_server

CARD = "---\nlibrary_name: transformers\ntags:\n- dpo\n---\n\n# t, round 0\n\ntext\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose train stage is done: files as training leaves them."""
    config = RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": str(tmp_path / "runs"),
            "languages": {"seen": ["en"]},
            "model": {"policy": "m"},
            "pairs": {"sources": [{"path": "p.jsonl"}]},
            "card": {"model_license": "apache-2.0"},
        }
    )
    rundir, train = RunDir(config.folder), BY_NAME["train"]
    folder = rundir.artifacts(train, 0)
    for name, base in (("model", None), ("adapter", "/some/folder")):
        (folder / name).mkdir(parents=True)
        (folder / name / "README.md").write_text(CARD)
        (folder / name / "weights.safetensors").write_bytes(b"w")
        if base:
            (folder / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    finish_train(rundir)
    done = State(Step(train, 0), "done", manifest=rundir.stage(train, 0))
    planner = type("Planner", (), {"states": lambda self: [replace(done, manifest=rundir.stage(train, 0))]})
    monkeypatch.setattr(pipeline.export_model, "recorded_planner", lambda *_: planner())
    return config


def finish_train(rundir: RunDir) -> None:
    """As training leaves what is there now."""
    folder = rundir.artifacts(BY_NAME["train"], 0)
    finish(rundir, "train", [files.record(rundir.root, p) for p in sorted(folder.rglob("*")) if p.is_file()], {})


def finish(rundir: RunDir, name: str, records: list[Any], ingredients: dict[str, Any]) -> None:
    spec = BY_NAME[name]
    common = {"stage": name, "round": 0, "fingerprint": "f"}
    state = rundir.state(spec, 0)
    write_manifest(state / "plan.json", StagePlan(ingredients=ingredients, shards=[], **common).model_dump())
    whole = StageManifest(content=content_of(records), files=records, tallies=[], **common)
    write_manifest(state / "_stage.json", whole.model_dump())


def evaluated(config: RunConfig, digest: str) -> None:
    rundir = RunDir(config.folder)
    path = rundir.table(BY_NAME["evaluate"], 0, "evaluation") / "part-00000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"model": model, "split": "test", "language": "en", "metric": "accuracy", "value": value, "n": 12}
        for model, value in (("before", 0.5), ("after", 0.75), ("after", None))
    ]
    rows.append(rows[1] | {"metric": "refused", "value": 0.1, "n": 4})
    rows += [
        rows[1] | {"split": "benchmark", "metric": f"{task}/acc", "value": 0.3, "n": 9} for task in ("mmlu", "xnli")
    ]
    pl.DataFrame(rows, schema={c: pl.Schema(TABLES["evaluation"].schema)[c] for c in rows[0]}).write_parquet(path)
    finish(rundir, "evaluate", [files.record(rundir.root, path, "evaluation", 3)], {"model trained": digest})


def header(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return found


def trained_digest(config: RunConfig) -> str:
    manifest = RunDir(config.folder).stage(BY_NAME["train"], 0)
    assert manifest is not None
    return content_of(pipeline.export_model.model_files(manifest))


def test_the_card_is_completed_with_licence_and_what_was_measured_of_this_model(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pipeline.export_model,
        "table_files",
        lambda folder, table, round_: sorted(Path(folder).rglob(f"{table}/*.parquet")),
    )
    out = export_model(config, tmp_path / "out", "model", None, None, False)
    assert header(out)["license"] == "apache-2.0" and "model-index" not in header(out)
    evaluated(config, "of another model")
    assert "model-index" not in header(export_model(config, out, "model", None, None, False))
    evaluated(config, trained_digest(config))
    (index,) = header(export_model(config, out, "model", 0, None, False))["model-index"]
    by_name = {result["dataset"]["name"]: result for result in index["results"]}
    assert by_name["t, test"]["metrics"] == [
        {"type": "accuracy", "value": 0.75, "name": "accuracy (12 items)"},
        {"type": "refused", "value": 0.1, "name": "refused (4 items)"},
    ]
    assert by_name["t, test"]["dataset"]["config"] == "en"
    assert [by_name[task]["metrics"] for task in ("mmlu", "xnli")] == [
        [{"type": "acc", "value": 0.3, "name": "acc (9 items)"}]
    ] * 2, "one entry for each benchmark"
    assert index["name"] == "t, round 0"
    read = next(
        r for r in ModelCard.load(out / "README.md").data.eval_results if r.metric_type == "accuracy"
    )  # which checks the model-index
    assert (read.metric_value, read.dataset_split, read.dataset_config) == (0.75, "test", "en")
    assert {p.name for p in out.iterdir()} == {"README.md", "weights.safetensors", MARK}
    assert "# t, round 0" in (out / "README.md").read_text()


def test_only_a_folder_that_an_export_made_is_replaced(config: RunConfig, tmp_path: Path) -> None:
    out = export_model(config, tmp_path / "out", "adapter", None, None, False)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "/some/folder"
    export_model(config, out, "model", None, None, False)
    (out / "mine.txt").write_text("precious")
    link, other = tmp_path / "link", tmp_path / "other"
    other.mkdir()
    (other / "weights.safetensors").write_text("precious")
    link.symlink_to(other)
    for place in (out, other, link):
        with pytest.raises(UserError, match=r"something else|link"):
            export_model(config, place, "model", None, None, False)
    assert (out / "mine.txt").read_text() == (other / "weights.safetensors").read_text() == "precious"


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_a_damaged_file_is_not_given_away(config: RunConfig, tmp_path: Path, what: str) -> None:
    bad = RunDir(config.folder).artifacts(BY_NAME["train"], 0) / what / "weights.safetensors"
    bad.write_bytes(b"x")
    with pytest.raises(UserError, match=f"file of the {what} is no longer what was written") as error:
        export_model(config, tmp_path / "out", what, None, None, False)  # type: ignore[arg-type]
    assert error.value.where == str(bad) and not (tmp_path / "out").exists()


def test_what_was_not_trained_is_not_exported(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="This run has no round 3"):
        export_model(config, tmp_path / "out", "model", 3, None, False)
    assert not (tmp_path / "out").exists()


def test_a_push_is_of_a_model_and_an_adapter_without_a_public_base_is_not_pushed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        hub.files = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"theirs"}
        out = export_model(config, tmp_path / "out", "model", None, "me/mine", True)
        assert hub.repos["model", "me/mine"]["visibility"] == "private"
        card = (out / "README.md").read_bytes()
        assert hub.files == {"README.md": card, "weights.safetensors": b"w", "notes.md": b"theirs"}
        hub.files.clear()
        with pytest.raises(UserError, match="nobody could load"):
            export_model(config, tmp_path / "adapter", "adapter", None, "me/mine", False)
        assert not hub.files and not (tmp_path / "adapter").exists()
        named = RunDir(config.folder).artifacts(BY_NAME["train"], 0) / "adapter/adapter_config.json"
        named.write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        finish_train(RunDir(config.folder))
        export_model(config, tmp_path / "adapter", "adapter", None, "me/mine", False)
        assert set(hub.files) == {"README.md", "adapter_config.json", "weights.safetensors"}
