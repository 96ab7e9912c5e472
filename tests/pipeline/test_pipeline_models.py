"""Which model plays which role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pipeline.local_crew
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.loop import run
from pipeline.models import Models
from pipeline.plan import Step
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from schemas.config import RunConfig
from schemas.manifests import FileRecord, StageManifest
from stages.catalog import BY_NAME
from stages.contract import ModelRef
from stages.schedule import schedule
from tests.faults.inline import InlineExecutor


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(
        "stages.models.resolve.resolve", lambda name, revision=None: ModelRef(name, tmp_path, f"digest of {name}")
    )

    def of(stage: str = "train", round_: int = 0, **train: Any) -> dict[str, str]:
        sections = train.pop("sections", {})
        config = RunConfig.model_validate(
            {
                "name": "roles",
                "run_dir": str(tmp_path),
                "languages": {"seen": ["en"]},
                "model": {"policy": "sft-model"},
                "prompts": {"sources": [{"path": "unused.jsonl"}]},
                "train": {"method": "full", **train},
                **sections,
            }
        )
        models = Models(config, RunDir(config.folder))
        return {role: model.name for role, model in models.of(Step(BY_NAME[stage], round_)).items()}

    return of


def finished(root: Path, stage: str, round_: int = 0) -> None:
    """A finished stage that left a model."""
    rundir, spec = RunDir(root), BY_NAME[stage]
    path = rundir.artifacts(spec, round_) / "model" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(stage.encode())
    record = FileRecord(path=str(path.relative_to(root)), table=None, rows=None, bytes=1, sha256=f"{stage}-{round_}")
    manifest = StageManifest(stage=stage, round=round_, fingerprint="f", content="c", files=[record], tallies=[])
    state = rundir.state(spec, round_)
    state.mkdir(parents=True)
    (state / "_stage.json").write_text(manifest.model_dump_json())


SFT = {"sft": {"sources": [{"path": "talks.jsonl"}]}, "rounds": 2}


def test_the_sft_model_is_the_policy_reference_and_judge_of_round_0(roles: Any, tmp_path: Path) -> None:
    assert roles("sft", sections=SFT) == {"start": "sft-model"}
    assert roles("generate", sections=SFT) == {}, "not there before the sft stage has finished"
    finished(tmp_path / "roles", "sft")
    own = "roles sft"
    assert roles("generate", sections=SFT) == {"policy": own}
    assert roles("judge", sections=SFT) == {"judge": own}
    assert roles("gradients", sections=SFT) == {"policy": own, "reference": own}
    assert roles("generate", 1, sections=SFT) == {}
    finished(tmp_path / "roles", "train")
    later = {"policy": "roles round 0", "reference": "roles round 0"}
    assert roles("gradients", 1, sections=SFT) == later
    assert roles("gradients", 1, reference="initial", sections=SFT) == later | {"reference": own}
    assert roles("evaluate", sections=SFT) == {"initial": own, "trained": "roles round 0", "evaluation_judge": own}
    judges = {"model": {"policy": "sft-model", "judge": "a", "evaluation_judge": "b"}}
    assert roles("judge", sections=SFT | judges) == {"judge": "a"}
    assert roles("evaluate", sections=SFT | judges)["evaluation_judge"] == "b"


def test_a_reference_that_is_named_is_that_of_the_first_round_or_of_all(roles: Any, tmp_path: Path) -> None:
    given = {"model": {"policy": "dpo-model", "reference": "sft-model"}, "rounds": 2}
    assert roles("gradients", sections=given) == {"policy": "dpo-model", "reference": "sft-model"}
    assert roles("train", sections=given)["reference"] == "sft-model"
    finished(tmp_path / "roles", "train")
    later = {"policy": "roles round 0", "reference": "roles round 0"}
    assert roles("gradients", 1, sections=given) == later
    assert roles("gradients", 1, reference="initial", sections=given) == later | {"reference": "sft-model"}


IMPLICIT = {"select": {"by": "smallest_gap"}}
NAMED = {"model": {"policy": "dpo-model", "reference": "sft-model"}}
SEQUENCE = {"objectives": [{"name": "a", "where": "language = 'en'"}, {"name": "b", "where": "language != 'en'"}]}


@pytest.mark.parametrize(
    ("train", "sections", "why"),
    [
        ({}, IMPLICIT, r"smallest_gap goes by implicit rewards.*model\.reference.*logp_margin"),
        ({"reference": "initial"}, IMPLICIT | {"rounds": 2}, r"model\.reference"),
        ({}, IMPLICIT | NAMED | {"rounds": 2}, r"after the first round.*train\.reference: initial"),
        ({}, IMPLICIT | NAMED | {"loss": {"type": "simpo"}}, "model.reference"),
        ({"allo": {"mask": "warmup", "warmup_steps": 2}}, NAMED, "model.reference and train.allo"),
        ({"orthalign": SEQUENCE}, NAMED, r"train\.orthalign\.reference: round"),
        ({}, NAMED | {"loss": {"type": "bco_pair"}}, "both_sides"),
    ],
)
def test_references_without_a_use_and_rewards_without_a_reference_are_refused(
    roles: Any, train: dict[str, Any], sections: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        roles(sections=sections, **train)
    assert roles(sections=IMPLICIT | NAMED)["reference"] == "sft-model"


def test_a_run_with_sft_makes_its_own_task_vector(roles: Any, tmp_path: Path) -> None:
    finished(tmp_path / "roles", "sft")
    own, start = "roles sft", "sft-model"
    policy = {"policy": own, "reference": own}
    assert roles(sections=SFT) == policy
    assert roles(optimizer="onties", sections=SFT) == policy | {"sft": own, "base": start}
    named = {"base": "pretrained", "sft": "another"}
    assert roles(optimizer="onties", merge=named, sections=SFT) == policy | {"sft": "another", "base": "pretrained"}
    assert roles(optimizer="anchor", merge={"alpha": 0.1}, sections=SFT) == policy | {"sft": own}


def test_sft_is_refused_where_it_would_have_no_effect_or_a_base_is_missing(roles: Any) -> None:
    server = {"engine": {"kind": "openai", "base_url": "http://localhost:1"}}
    with pytest.raises(ValueError, match="generates with whatever the server has"):
        roles(sections=SFT | server)
    with pytest.raises(ValueError, match=r"needs train.merge.base.*sft.sources has its own"):
        roles(optimizer="onties")


def test_train_depends_on_sft_and_base_only_when_it_merges(roles: Any) -> None:
    policy = {"policy": "sft-model", "reference": "sft-model"}
    assert roles() == policy
    merge = {"base": "pretrained"}
    assert roles(optimizer="onties", merge=merge) == policy | {"sft": "sft-model", "base": "pretrained"}
    other = roles(optimizer="ondare", merge=merge | {"sft": "another"})
    assert other == policy | {"sft": "another", "base": "pretrained"}
    assert roles(optimizer="anchor", merge={"alpha": 0.1}) == policy | {"sft": "sft-model"}


def test_models_from_outside_are_those_to_look_at_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run trains has the architecture of its start; a reward model may be no language model."""
    monkeypatch.setattr(
        "stages.models.resolve.resolve", lambda name, revision=None: ModelRef(name, tmp_path, f"digest of {name}")
    )
    config = RunConfig.model_validate(
        {
            "name": "t",
            "rounds": 2,
            "model": {"policy": "mine", "judge": "other"},
            "languages": {"seen": ["en"]},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
        }
    )
    found = Models(config, RunDir(tmp_path)).outside(schedule(config))
    assert {model.name: sketched for model, sketched in found.items()} == {"mine": True, "other": False}


def test_a_run_that_stops_before_any_model_looks_at_none(write_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for its report either: the model may have to be fetched, to where nobody may write."""

    def fetch(name: str, revision: str | None = None) -> ModelRef:
        raise AssertionError(f"{name} was looked for")

    monkeypatch.setattr("stages.models.resolve.resolve", fetch)
    monkeypatch.setattr(InlineExecutor, "computed", [], raising=False)
    monkeypatch.setattr(pipeline.local_crew, "local_executor", InlineExecutor)
    config = load_config(write_config(prompts={"sources": [{"path": "package:prompts/{language}.jsonl", "limit": 3}]}))
    outcome = run(config, Selection(last="prompts"), Display(quiet=True))
    assert [step.title for step in outcome.ran] == ["prompts"] and (config.folder / "report.html").exists()
