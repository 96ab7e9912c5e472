"""Loggers are checked before anything is paid for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import INTEGRATION_TO_CALLBACK

import pipeline.preflight
import schemas.config.loggers
from pipeline.preflight import preflight
from schemas.config import RunConfig
from schemas.config.loggers import LOGGERS
from schemas.errors import UserError
from stages.catalog import BY_NAME
from stages.train.stage import Train


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "t", "languages": {"seen": ["en"]}, "model": {"policy": "m"}, "pairs": {"sources": [{"path": "p"}]}}
        | sections
    )


def test_the_loggers_are_those_of_transformers() -> None:
    assert set(LOGGERS) == set(INTEGRATION_TO_CALLBACK) - {"kubeflow"}  # which is no package but a cluster's own


@pytest.mark.parametrize("section", ["sft", "train"])
@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("comet_ml", "comet-ml"), ("wandb", "wandb")])
def test_a_missing_logger_is_named_with_its_package_before_any_stage(
    section: str, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas.config.loggers, "find_spec", lambda module: None)
    monkeypatch.setattr(pipeline.preflight, "find_spec", lambda module: None if module == name else True)
    settings: dict[str, Any] = {"report_to": [name]}
    if section == "sft":
        settings["sources"] = [{"path": "package:authored_pairs/{language}.jsonl"}]
    with pytest.raises(UserError, match=f"not installed: {name}") as error:
        preflight(config(**{section: settings}), [BY_NAME[section]])
    assert error.value.where == f"{section}.report_to" and f"pip install {package}," in error.value.fix


@pytest.mark.parametrize("section", ["sft", "train"])
@pytest.mark.parametrize(
    ("name", "near"), [("wanb", "did you mean wandb"), ("all", "for none"), ("none", r"\[\] for none")]
)
def test_an_unknown_logger_is_refused_with_the_config(section: str, name: str, near: str) -> None:
    with pytest.raises(ValidationError, match=near) as error:
        config(**{section: {"report_to": [name]}})
    assert f"{section}.report_to" in str(error.value)


def test_every_phase_has_curves_of_its_own(workbench: Any) -> None:
    objectives = [{"name": code, "where": f"language = '{code}'"} for code in ("en", "de")]
    allo = {"mask": "warmup", "warmup_steps": 2, "forget_ratio": 0.5, "learn_ratio": 0.5, "allow_empty_layers": True}
    ctx = workbench.context(
        method="full", epochs=1, allo=allo, orthalign={"objectives": objectives, "q_max": 2}, report_to=["tensorboard"]
    )
    rows, _ = Train().run(ctx)
    curves: dict[str, list[int]] = {}
    for file in sorted((ctx.folder / "logs").glob("events.out.tfevents*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            if name.endswith("/loss"):
                curves.setdefault(name, []).extend(event.step for event in events.Scalars(name))
    phases = {"allo/warmup/": [1, 2], "allo/forget/": [1, 2], "": [1, 2]}
    assert curves == {
        f"train/objective/{code}/{phase}loss": steps for code in ("en", "de") for phase, steps in phases.items()
    }
    assert {row["name"] for row in rows.data.to_pylist() if row["name"].endswith("loss")} >= {
        "loss",
        "allo/forget/loss",
    }
