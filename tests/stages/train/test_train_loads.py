"""What training leaves is loaded by other libraries, from another folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from stages.contract import Context
from stages.train.stage import Train

EMBEDDED = "embedded:tiny"


@pytest.fixture(scope="module")
def trained(shared_workbench: Any) -> Context:
    ctx = shared_workbench.context(epochs=2)
    ref = replace(shared_workbench.model, name=EMBEDDED)  # a name no other library knows
    list(Train().run(replace(ctx, models={"policy": ref, "reference": ref})))
    return ctx


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval().float()(torch.tensor([[3, 5, 8, 13]])).logits
    return found


def test_transformers_and_peft_load_adapter_and_model_alike(trained: Context) -> None:
    adapter, merged = (str(trained.folder / name) for name in ("adapter", "model"))  # type: ignore[operator]
    whole = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    for model in (
        AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
    ):
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)
    for folder in (adapter, merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template and (Path(folder) / "README.md").is_file()


def test_trl_trains_on_from_the_model_and_from_the_adapter(trained: Context, tmp_path: Path) -> None:
    adapter, merged = (str(trained.folder / name) for name in ("adapter", "model"))  # type: ignore[operator]
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    base = json.loads(Path(adapter, "adapter_config.json").read_text())["base_model_name_or_path"]
    models = (
        merged,
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True),
    )
    for model in models:
        arguments = DPOConfig(
            str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no"
        )
        trainer = DPOTrainer(
            model, args=arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(adapter)
        )
        assert trainer.train().training_loss == pytest.approx(0.693, abs=0.05)


@pytest.mark.parametrize("hub", [False, True])
def test_the_adapter_names_a_base_that_is_there_or_the_hubs_commit(shared_workbench: Any, hub: bool) -> None:
    ctx = shared_workbench.context(f"named-{hub}", max_steps=1)
    ref = replace(
        shared_workbench.model, name="org/model", **({"hub": "org/model", "revision": "c" * 40} if hub else {})
    )
    list(Train().run(replace(ctx, models={"policy": ref, "reference": ref})))
    config = json.loads((ctx.folder / "adapter" / "adapter_config.json").read_text())
    named = config["base_model_name_or_path"], config["revision"]
    if hub:
        assert named == ("org/model", "c" * 40)
    else:
        assert Path(named[0]).is_absolute() and Path(named[0]).is_dir() and named[1] is None
