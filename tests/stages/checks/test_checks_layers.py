"""Layers that training as the config says needs, or cannot have, are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from benchmarks.tiny_models import tiny_config
from benchmarks.tiny_models import tiny_model as made_tiny
from pipeline.models import Models
from pipeline.preflight import look_at_models
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.config.trainer import LoraConfig
from schemas.errors import UserError
from stages.schedule import schedule


def config(model: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en"]},
            "model": {"policy": str(model)},
            "pairs": {"sources": [{"path": "p.jsonl"}]},
        }
        | sections
    )


def of_kind(kind: str, tokenizer_of: Path, root: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    made_tiny(tiny_config(kind, vocab_size=len(tokenizer))).save_pretrained(root / kind)
    tokenizer.save_pretrained(root / kind)
    return root / kind


@pytest.mark.parametrize("section", ["sft", "train"])
@pytest.mark.parametrize("target", ["q_prj", "lm_head", "attn.q_proj"])
def test_an_unknown_target_is_refused_with_the_names_there_are(
    tiny_model: Path, tmp_path: Path, section: str, target: str
) -> None:
    settings: dict[str, Any] = {"method": "lora", "lora": {"target_modules": ["q_proj", target]}}
    if section == "sft":
        settings["sources"] = [{"path": "t.jsonl"}]
    made = config(tiny_model, **{section: settings})
    models = Models(made, RunDir(tmp_path / "run"))
    with pytest.raises(UserError, match=f"cannot adapt {target}") as error:
        look_at_models(made, models, schedule(made))
    assert error.value.where == f"{section}.lora.target_modules" and "q_proj" in error.value.fix


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(ValidationError, match="should have at least 1 item"):
        LoraConfig(target_modules=[])


def test_known_targets_are_fine(tiny_model: Path, tmp_path: Path) -> None:
    made = config(tiny_model, train={"lora": {"target_modules": ["q_proj", "self_attn.k_proj", "down_proj"]}})
    assert look_at_models(made, Models(made, RunDir(tmp_path / "run")), schedule(made))


@pytest.mark.parametrize(
    ("kind", "method", "words"),
    [
        ("gpt2", "lora", "c_attn is a Conv1D"),
        ("gpt2", "full", "c_attn is a Conv1D"),
        ("qwen3_moe", "full", "experts.gate_up_proj is a stack of matrices"),
        ("qwen3_moe", "lora", None),
        ("mamba2", "full", None),  # a depthwise convolution is no stack
    ],
)
def test_weights_that_objectives_cannot_protect_are_refused(
    kind: str, method: str, words: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    folder = of_kind(kind, tiny_model, tmp_path)
    objectives = [{"name": "a", "where": "language = 'en'"}, {"name": "b", "where": "language = 'de'"}]
    made = config(folder, train={"method": method, "orthalign": {"objectives": objectives}})
    models = Models(made, RunDir(tmp_path / "run"))
    if words is None:
        assert look_at_models(made, models, schedule(made))
        return
    with pytest.raises(UserError, match=words) as error:
        look_at_models(made, models, schedule(made))
    assert error.value.where == "train.orthalign"


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt2"])
def test_rows_that_are_no_neurons_are_refused(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = of_kind(kind, tiny_model, tmp_path)
    made = config(folder, train={"method": "full", "allo": {"mask": "gradient", "unit": "row"}})
    with pytest.raises(UserError, match="stores its weights transposed") as error:
        look_at_models(made, Models(made, RunDir(tmp_path / "run")), schedule(made))
    assert error.value.where == "train.allo.unit: row"


def test_rows_of_stacks_that_are_neurons_are_fine(tiny_model: Path, tmp_path: Path) -> None:
    made = config(
        of_kind("qwen3_moe", tiny_model, tmp_path),
        train={"method": "full", "allo": {"mask": "gradient", "unit": "row"}},
    )
    assert look_at_models(made, Models(made, RunDir(tmp_path / "run")), schedule(made))


def test_a_model_that_trls_forward_cannot_run_is_refused_when_planned(tiny_model: Path, tmp_path: Path) -> None:
    made = config(of_kind("llama4_text", tiny_model, tmp_path))
    with pytest.raises(UserError, match="Llama4ForCausalLM has no text model of its own") as error:
        look_at_models(made, Models(made, RunDir(tmp_path / "run")), schedule(made))
    assert error.value.where == "train"
    until = [step for step in schedule(made) if step.spec.name != "train"]
    assert look_at_models(made, Models(made, RunDir(tmp_path / "other")), until)


def look_at_objectives_under_masks(
    model: Path, root: Path, sequence: dict[str, Any] | None = None, **allo: Any
) -> list[str]:
    objectives = [{"name": "a", "where": "language = 'en'"}, {"name": "b", "where": "language = 'de'"}]
    train = {
        "method": "full",
        "allo": {"mask": "warmup", **allo},
        "orthalign": {"objectives": objectives, **(sequence or {})},
    }
    made = config(model, train=train)
    return look_at_models(made, Models(made, RunDir(root / "run")), schedule(made))


def test_factors_beyond_their_bound_are_refused_when_planned(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bytes to forget with masks of single weights") as error:
        look_at_objectives_under_masks(tiny_model, tmp_path, factor_bytes=5000)
    assert error.value.where == "train.allo.factor_bytes: 5,000" and "Set train.allo.unit: row" in error.value.fix
    assert look_at_objectives_under_masks(tiny_model, tmp_path, factor_bytes=1 << 30)
    assert look_at_objectives_under_masks(tiny_model, tmp_path, unit="row")


def test_matrices_in_which_nothing_can_move_are_counted_when_planned(tiny_model: Path, tmp_path: Path) -> None:
    def said(q_max: int, side: str, **allo: Any) -> list[str]:
        notes = look_at_objectives_under_masks(tiny_model, tmp_path, {"q_max": q_max, "side": side}, **allo)
        return [note for note in notes if note.startswith("the last objective")]

    (forget,) = said(4, "left", forget_ratio=0.05, learn_ratio=0.5)  # 64 outputs: about 3 weights of a column
    assert "forget little in 10 of 16 matrices" in forget and "about 3 weights, up to 4 directions" in forget
    assert len(said(64, "right")) == 2 and not said(64, "right", unit="row")
    assert not said(1, "left", forget_ratio=0.5, learn_ratio=0.5)
