"""Which model plays which role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.models import Models
from pipeline.plan import Step
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from stages.catalog import BY_NAME
from stages.contract import ModelRef


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(
        "stages.models.resolve.resolve", lambda name, revision=None: ModelRef(name, tmp_path, f"digest of {name}")
    )

    def of_train(**train: Any) -> dict[str, str]:
        config = RunConfig.model_validate(
            {
                "name": "roles",
                "run_dir": str(tmp_path),
                "languages": {"seen": ["en"]},
                "model": {"policy": "sft-model"},
                "prompts": {"sources": [{"path": "unused.jsonl"}]},
                "train": {"method": "full", **train},
            }
        )
        models = Models(config, RunDir(config.folder))
        return {role: model.name for role, model in models.of(Step(BY_NAME["train"], 0)).items()}

    return of_train


def test_train_depends_on_sft_and_base_only_when_it_merges(roles: Any) -> None:
    policy = {"policy": "sft-model", "reference": "sft-model"}
    assert roles() == policy
    merge = {"base": "pretrained"}
    assert roles(optimizer="onties", merge=merge) == policy | {"sft": "sft-model", "base": "pretrained"}
    other = roles(optimizer="ondare", merge=merge | {"sft": "another"})
    assert other == policy | {"sft": "another", "base": "pretrained"}
    assert roles(optimizer="anchor", merge={"alpha": 0.1}) == policy | {"sft": "sft-model"}
