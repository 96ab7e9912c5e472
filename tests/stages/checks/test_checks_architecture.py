"""What a look at the model without its weights says before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.checks.architecture import look
from stages.contract import ModelRef


def config(of: str = "adapter", **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en"]},
            "model": {"policy": "mine"},
            "pairs": {"sources": [{"path": "pairs.jsonl"}]},
            "gradients": {"of": of},
            "train": {"method": "lora"},
            **sections,
        }
    )


def adapter(tmp_path: Path, base: Path, **lora: Any) -> ModelRef:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], **lora))
    model.save_pretrained(tmp_path / "adapter")
    return ModelRef("mine", base, "", (tmp_path / "adapter", base))


def test_of_an_adapter_its_own_matrices_are_looked_at(tmp_path: Path, tiny_model: Path) -> None:
    found = look(adapter(tmp_path, tiny_model, r=2), config(), sketched=True)
    assert found.coverage is not None
    assert sorted(layer.name.split(".", 4)[-1] for layer in found.coverage.layers) == sorted(
        2 * ["q_proj.lora_A.default", "q_proj.lora_B.default"]
    )
    assert found.coverage.total_parameters == 2 * 2 * (64 + 64)


def test_an_adapter_whose_gradient_cannot_be_sketched_is_refused_before_any_work(
    tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match="DoRA"):
        look(adapter(tmp_path, tiny_model, r=2, use_dora=True), config(), sketched=True)


def test_a_model_without_an_adapter_is_refused_before_any_work(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"no LoRA adapter .*gradients\.of: adapter"):
        look(ModelRef("mine", tiny_model, ""), config(), sketched=True)
    assert look(ModelRef("mine", tiny_model, ""), config(), sketched=False).coverage is None
    assert look(ModelRef("mine", tiny_model, ""), config("weights"), sketched=True).coverage is not None


def test_an_adapter_that_the_run_itself_will_make_is_not_asked_for(tiny_model: Path) -> None:
    sft = {"sft": {"sources": [{"path": "talks.jsonl"}], "method": "lora"}}
    assert look(ModelRef("mine", tiny_model, ""), config(**sft), sketched=True).coverage is None


def test_float16_is_refused_before_any_work_where_gradients_are_part_of_it(tiny_model: Path) -> None:
    half, model = config("weights", model={"policy": "mine", "dtype": "float16"}), ModelRef("mine", tiny_model, "")
    with pytest.raises(UserError, match=r"underflow \(model\.dtype: float16\)"):
        look(model, half, sketched=True)
    assert look(model, half, sketched=False).coverage is None
