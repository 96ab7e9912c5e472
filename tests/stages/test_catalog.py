"""What the catalog says of a stage is so."""

from __future__ import annotations

import importlib
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest

from schemas.config import RunConfig
from schemas.engines import ENGINES
from stages.catalog import STAGES
from stages.contract import ArtifactStage, ShardStage, TableStage
from stages.engines.base import Engine, StreamingEngine
from stages.spec import StageSpec, config_value

CONFIG = RunConfig.model_validate(
    {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "x"},
        "prompts": {"sources": [{"path": "p.jsonl"}]},
    }
)


@pytest.mark.parametrize("spec", STAGES, ids=lambda spec: spec.name)
def test_a_stage_is_of_the_kind_its_facts_say_and_its_keys_exist(spec: StageSpec) -> None:
    module, name = spec.entry.split(":")
    stage = getattr(importlib.import_module(module), name)()
    assert isinstance(stage, {"shard": ShardStage, "table": TableStage, "artifact": ArtifactStage}[spec.kind])
    assert ForkingPickler.dumps(spec), "an order carries it to another process"
    for key in (*spec.sections, *filter(None, (spec.sources, spec.gpus, spec.size))):
        config_value(CONFIG, key)
    if spec.kind == "shard":
        assert spec.shard_rows(CONFIG) > 0
    for needs in spec.needs:
        assert needs(CONFIG).packages is not None
    assert spec.kind == "artifact" or not (spec.keeps or spec.trains), "only an ArtifactStage has a folder"
    assert not spec.trains or spec.trains in spec.models


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_a_module_of_its_name_with_a_load(name: str) -> None:
    module = importlib.import_module(f"stages.engines.{name}")
    facts = ENGINES[name]  # type: ignore[index]
    made = importlib.import_module("typing").get_type_hints(module.load)["return"]
    assert issubclass(made, StreamingEngine if facts.own_process else Engine)
    assert facts.packages


def test_a_worker_sees_the_gpus_that_its_stage_asks_for() -> None:
    by_name = {spec.name: spec for spec in STAGES}
    assert by_name["gradients"].gpus_per_worker(CONFIG, 8) == 1
    assert by_name["train"].gpus_per_worker(CONFIG, 8) == (CONFIG.train.processes or 8)
    assert by_name["generate"].gpus_per_worker(CONFIG, 8) == CONFIG.engine.tensor_parallel


def test_a_judge_on_an_engine_of_its_own_has_that_ones_gpus() -> None:
    judge = next(spec for spec in STAGES if spec.name == "judge")
    served = {"kind": "openai", "base_url": "http://localhost:1/v1"}
    own = {"judge": {"engine": {"kind": "vllm", "tensor_parallel": 2}}}
    config = RunConfig.model_validate(CONFIG.model_dump(mode="json", exclude_unset=True) | {"engine": served} | own)
    assert judge.holds_gpu(config) and judge.gpus_per_worker(config, 8) == 2
    generate = next(spec for spec in STAGES if spec.name == "generate")
    assert not generate.holds_gpu(config) and generate.gpus_per_worker(config, 8) == 1


def test_every_spec_can_be_sent_to_a_worker_process():
    assert all(pickle.dumps(spec) for spec in STAGES)
