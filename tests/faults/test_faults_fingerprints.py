"""Every config key, changed between a crash and its resume: a semantic one never mixes rows, another one resumes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import fake_stages
import polars as pl
import pytest
import yaml

import stages.catalog
import stages.schedule
from pipeline.commit import write_manifest
from pipeline.fingerprint import content_of
from pipeline.plan import Planner, State
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import FileRecord, PartManifest, StageManifest
from stages.contract import Part, ShardStage, tally
from stages.spec import StageSpec
from tests.faults.every_key import (
    ELSEWHERE,
    OWN,
    base_config,
    every_key,
    every_key_elsewhere,
    every_one_sided_key,
    every_own_key,
    one_sided_config,
)
from tests.faults.inline import SPECS, FakeRun, fake_pipeline

KEYS = list(every_key())
SEMANTIC = [key for key, semantic, _ in KEYS if semantic]


def planner(config: RunConfig, root: Path) -> Planner:
    return Planner(config, RunDir(root), lambda step: dict.fromkeys(step.spec.models, "digest"), lambda spec: {})


def finish(planner: Planner, half: str | None = None) -> None:
    """Write the state of a finished run (two parts a stage); of `half`, only the first part."""
    rundir = planner.rundir
    for step in planner.steps:
        state = planner.state(step)
        if state.kind == "waiting" or state.plan is None:
            return
        folder, records = rundir.state(step.spec, step.round), []
        for table in step.spec.writes:
            path = rundir.table(step.spec, step.round, table) / "part-00000.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            relative = path.relative_to(rundir.root).as_posix()
            records.append(FileRecord(path=relative, table=table, rows=10, bytes=1, sha256=table))
        common = {"stage": step.spec.name, "round": step.round, "fingerprint": state.plan.fingerprint}
        write_manifest(folder / "plan.json", state.plan.model_dump())
        part = PartManifest(index=0, files=records, tallies=[], **common)
        write_manifest(folder / "part-00000.json", part.model_dump())
        if step.spec.name == half:
            return
        whole = StageManifest(content=content_of(records), files=records, tallies=[], **common)
        write_manifest(folder / "_stage.json", whole.model_dump())


def depends(spec: StageSpec, key: str) -> bool:
    return key == "seed" or any(key == s or key.startswith(f"{s}.") or s.startswith(f"{key}.") for s in spec.sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    finish(planner(RunConfig.model_validate(base_config()), root))
    return root


def unchanged(state: State) -> bool:
    """Whether nothing of its own is other than it was; what it reads may have been made with other settings."""
    return state.kind == "done" or (state.kind == "stale" and state.cause is not None)


def states(changed: dict, root: Path) -> list[State]:
    found = planner(RunConfig.model_validate(changed), root)
    return [found.state(step) for step in found.steps]


def test_the_finished_run_is_done_and_the_keys_are_all_there(finished):
    assert {s.kind for s in states(base_config(), finished)} == {"done"}
    assert len(KEYS) > 130 and {"seed", "generate.sampling.top_p", "prompts.sources.0.fields.prompt"} <= set(SEMANTIC)


@pytest.mark.parametrize(("key", "semantic", "changed"), KEYS, ids=[k for k, _, _ in KEYS])
def test_every_key_is_in_the_fingerprint_of_the_stages_that_depend_on_it_and_of_no_other(
    finished, key, semantic, changed
):
    for state in states(changed, finished):
        named = [line for line in state.why if line.startswith(re.split(r"\.\d+\.", key)[0])]
        if semantic and depends(state.step.spec, key):
            assert state.kind == "changed" and named, (state.step.title, state.why)
        else:
            assert unchanged(state), (state.step.title, state.why)
    if semantic:
        assert any(depends(step.spec, key) for step in planner(RunConfig.model_validate(changed), finished).steps), (
            f"{key} is semantic, but no stage has it in its fingerprint: mark it execution, or name its section"
        )


def test_a_stage_half_done_with_other_columns_is_done_anew(tmp_path, monkeypatch):
    config = RunConfig.model_validate(base_config())
    with monkeypatch.context() as before:
        before.setattr("pipeline.fingerprint.SCHEMA_VERSION", 1)
        finish(planner(config, tmp_path), half="generate")
    found = planner(config, tmp_path)
    state = next(s for s in map(found.state, found.steps) if s.step.spec.name == "generate")
    assert state.kind == "changed" and any("schema for it is another version (1 -> 3)" in why for why in state.why), (
        state.why
    )


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_key_that_another_config_uses_is_in_the_fingerprint_of_the_stages_that_depend_on_it(name, tmp_path):
    config, prefixes = ELSEWHERE[name]
    finish(planner(RunConfig.model_validate(config()), tmp_path))
    keys = list(every_key_elsewhere(name))
    assert len(keys) >= len(prefixes)
    for key, semantic, changed in keys:
        for state in states(changed, tmp_path):
            right = state.kind == "changed" if semantic and depends(state.step.spec, key) else unchanged(state)
            assert right, (key, state.step.title, state.why)


@pytest.mark.parametrize(
    ("prefix", "count", "execution"),
    [
        ("train.allo.", 12, {"train.allo.reward_model"}),
        ("train.lora.", 4, set()),
        ("train.processes", 1, {"train.processes"}),
        ("train.nodes", 1, {"train.nodes"}),
        ("train.language_surgery", 1, set()),
    ],
)
def test_every_key_the_base_config_refuses_is_in_the_fingerprint_of_train_or_execution(
    prefix, count, execution, tmp_path
):
    finish(planner(RunConfig.model_validate(OWN[prefix]()), tmp_path))
    keys = list(every_own_key(prefix))
    assert len(keys) >= count and {key for key, semantic, _ in keys if not semantic} == execution
    for key, semantic, changed in keys:
        kinds = {s.step.spec.name: s.kind for s in states(changed, tmp_path) if s.step.round == 0}
        assert kinds["train"] == ("changed" if semantic else "done") and kinds["select"] == "done", key


def test_every_key_of_one_sided_compression_redoes_what_depends_on_it(tmp_path):
    finish(planner(RunConfig.model_validate(one_sided_config()), tmp_path))
    keys = list(every_one_sided_key())
    assert len(keys) == 3 and all(semantic for _, semantic, _ in keys)
    for key, _, changed in keys:
        kinds = {s.step.spec.name: s.kind for s in states(changed, tmp_path) if s.step.round == 0}
        first = "changed" if key.endswith("precondition_pairs") else "done"
        assert (kinds["pairs"], kinds["precondition"]) == ("done", first), key
        assert kinds["aggregate"] == kinds["gradients"] == "changed", key


@pytest.mark.parametrize("config", [base_config, one_sided_config])
def test_another_train_reference_makes_gradients_again_only_where_the_model_is_another(tmp_path, config):
    """The digest of the model that plays the role says it: `reference` in the specs' models."""
    finish(planner(RunConfig.model_validate(config()), tmp_path))
    changed = config()
    changed["train"] = changed["train"] | {"reference": "initial"}
    for state in states(changed, tmp_path):
        assert (state.kind == "changed") == (state.step.spec.name == "train"), state.step.title
    for name in ("aggregate", "gradients", "train"):
        assert "reference" in stages.catalog.BY_NAME[name].models


@pytest.mark.parametrize("loss", [{"type": "hinge"}, {"beta": 0.5}, {"alpha": 0.01}])
def test_another_loss_makes_no_gradient_again(finished, loss):
    found = {
        (s.step.spec.name, s.step.round): (s.kind, s.why) for s in states(base_config() | {"loss": loss}, finished)
    }
    by_loss = {name for (name, _), (_, why) in found.items() if any(line.startswith("loss.") for line in why)}
    assert by_loss == {"conflict", "train"}
    assert {kind for (name, number), (kind, _) in found.items() if name == "gradients"} == {"done", "stale"}


def test_imported_pairs_replace_generation(finished):
    changed = base_config() | {"pairs": {"sources": [{"path": "mine.jsonl"}]}, "rounds": 1}
    kinds = {s.step.spec.name: s.kind for s in states(changed, finished)}
    assert kinds["pairs"] == "changed" and "generate" not in kinds


@pytest.mark.parametrize("what", ["model", "file", "input"])
def test_a_changed_model_or_file_changes_the_stages_that_read_it(finished, what):
    config = RunConfig.model_validate(base_config())
    found = planner(config, finished)
    if what == "model":
        found._models = lambda step: dict.fromkeys(step.spec.models, "other digest")
    elif what == "file":
        found._config_files = lambda spec: {"prompts.jsonl": "hash"} if spec.name == "prompts" else {}
    else:
        path = finished / "_state/prompts/_stage.json"
        before = path.read_text()
        path.write_text(before.replace('"sha256": "prompts"', '"sha256": "other"'))
    kinds = {(s.step.spec.name, s.step.round): (s.kind, s.why) for s in map(found.state, found.steps)}
    if what == "input":
        path.write_text(before)
    changed = {name for (name, _), (kind, why) in kinds.items() if kind == "changed" and f"{what} " in "".join(why)}
    readers = {
        "model": {s.name for s in stages.schedule.STAGES if s.models and s.is_part_of(config)},
        "file": {"prompts"},
        "input": {"generate", "judge", "pairs", "evaluate"},
    }
    assert changed == readers[what]


_OF_ROUNDS = ("rounds", "train.reference")
"""What has no use in a single round."""


class Stamp(ShardStage):
    """Writes the whole semantic config into every row, so that rows of two configs could be told apart."""

    stop_after = -1

    def run(self, ctx, shards):
        from schemas.config.base import semantic_values
        from schemas.ids import canonical_json

        stamp = canonical_json(semantic_values(ctx.config))
        for count, shard in enumerate(shards):
            if count == self.stop_after:
                raise KeyboardInterrupt
            n = shard.rows.num_rows
            rows = fake_stages.rows("candidates", text=[stamp] * n)
            yield Part(shard.index, {"candidates": rows}, tally("prompt", ["en"] * n, []))


@pytest.mark.parametrize(
    "key",
    sorted({k.split(".")[0]: k for k, _, _ in KEYS if "sources" not in k and k not in _OF_ROUNDS}.values()),
)
def test_rows_of_two_configs_never_mix_after_a_crash(tmp_path, key):
    """One key of every section, through the run loop: redone when asked for, refused else, resumed if execution."""
    sections = tuple(name for name in RunConfig.model_fields if name not in ("name", "run_dir", "banner", "rounds"))
    generate = replace(SPECS[1], entry="fake_stages:Stamp", sections=sections)
    semantic, changed = next((s, c) for k, s, c in KEYS if k == key)
    changed = changed | {"run_dir": str(tmp_path / "runs"), "name": "t", "rounds": 1}
    with fake_pipeline(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fake_stages, "Stamp", Stamp, raising=False)
        specs = (SPECS[0], generate)
        monkeypatch.setattr(stages.schedule, "STAGES", specs)
        small = {"prompts": {**base_config()["prompts"], "max_chars": 12}, "generate": {"shard_size": 4}, "rounds": 1}
        run = FakeRun(tmp_path, base_config() | small | {"run_dir": str(tmp_path / "runs")})
        monkeypatch.setattr(Stamp, "stop_after", 2)
        with pytest.raises(KeyboardInterrupt):
            run()
        monkeypatch.setattr(Stamp, "stop_after", -1)
        for name, value in {"prompts.max_chars": 12, "generate.shard_size": 4}.items():
            section, _, field = name.partition(".")
            changed[section] = changed[section] | ({} if key == name else {field: value})
        run.path.write_text(yaml.safe_dump(changed))
        run.computed.clear()
        if semantic:
            with pytest.raises(UserError, match=r"made with other settings|made from other inputs"):
                run()
            run(force=("prompts", "generate"))
        else:
            run()
    texts = pl.read_parquet(run.root / "round-0/candidates/*.parquet")["text"]
    assert texts.n_unique() == 1, "rows of two configs lie in one table"
    made = [part for stage, part in run.computed if stage == "generate"]
    assert made == ([2] if not semantic else list(range(len(made)))) and len(texts) >= 12
