"""What a stage reads of the config is in its fingerprint: a setting cannot change its rows behind the resume's back."""

from __future__ import annotations

import shutil
from itertools import accumulate

import pytest

from pipeline.config_digests import config_files
from pipeline.config_file import load_config
from pipeline.messages import Order
from pipeline.models import Models
from pipeline.plan import Planner
from pipeline.rundir import RunDir
from pipeline.runner import context_of, read_range, stage_of
from schemas.config.base import Section, is_execution
from stages.contract import Account, Shard, Silent

_FOR_THE_CARD = {
    "train": {
        *("pairs.sources", "prompts.sources", "prompts.sources.format", "prompts.sources.path", "sft.sources"),
        *("languages.seen", "languages.unseen", "select.by", "select.keep", "select.quota"),
        *("judge.criteria", "judge.panel"),
    }
}
"""Read for the text of the model card only, which is no part of the model's digest; curated says what was selected."""


def paths_of(section: Section, prefix: str = "") -> dict[int, str]:
    """id of every section of the config -> its dotted path."""
    found = {id(section): prefix}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= paths_of(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for item in value:
                found |= paths_of(item, f"{prefix}{name}.") if isinstance(item, Section) else {}
    return found


def covered(key: str, sections: tuple[str, ...]) -> bool:
    return key == "seed" or any(key == s or key.startswith(f"{s}.") for s in sections)


def test_every_setting_a_stage_reads_is_in_its_fingerprint(whole_run, tmp_path, monkeypatch):
    path, finished, _ = whole_run
    root = tmp_path / "t"
    shutil.copytree(finished, root)
    for cached in [*root.glob("round-0/evaluate/*.parquet"), *root.glob("round-0/train/checkpoints/*")]:
        shutil.rmtree(cached) if cached.is_dir() else cached.unlink()
    config, rundir = load_config(path, [f"run_dir={tmp_path}"]), RunDir(root)
    models = Models(config, rundir)
    planner = Planner(config, rundir, models.digests, lambda spec: config_files(spec, config))
    where = paths_of(config)
    read: set[str] = set()
    real = Section.__getattribute__

    def watched(section: Section, name: str) -> object:
        value = real(section, name)
        field = type(section).__pydantic_fields__.get(name) if not name.startswith("_") else None
        if field is not None and id(section) in where and not is_execution(field) and not isinstance(value, Section):
            read.add(where[id(section)] + name)
        return value

    behind: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    shared: dict = {}
    for step in planner.steps:
        state = planner.state(step)
        assert state.plan is not None
        records = state.inputs.records
        order = Order(
            step.spec, 0, config, root, rundir.temporary, state.plan.fingerprint, records, models.of(step), {}
        )
        ctx = context_of(order, Silent(), lambda: False, shared)
        stage = stage_of(step.spec)
        source = records.get(step.spec.reads[0].rstrip("?"), []) if step.spec.reads else []
        ends = list(accumulate(f.rows or 0 for f in source))
        shards = [Shard(s.index, read_range(root, source, ends, s)) for s in state.plan.shards[:2] if s.stop]
        with monkeypatch.context() as patch:
            patch.setattr(Section, "__getattribute__", watched)
            read.clear()
            for item in stage.run(ctx, iter(shards)) if step.spec.kind == "shard" else stage.run(ctx):
                if isinstance(item, Account):
                    break
        seen[step.spec.name] = len(read)
        read -= _FOR_THE_CARD.get(step.spec.name, set())
        if missing := sorted(key for key in read if not covered(key, step.spec.sections)):
            behind[step.spec.name] = missing
    for resource in shared.values():
        if hasattr(resource, "close"):
            resource.close()
    assert all(seen.values()), seen
    if behind:
        pytest.fail(f"read, but not in the fingerprint (stages.catalog sections): {behind}")
