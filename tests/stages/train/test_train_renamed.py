"""Architectures whose weights have other names in files than in the module (experts are one tensor there, many here)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.tiny_models import tiny_config
from benchmarks.tiny_models import tiny_model as made
from schemas.errors import UserError
from stages.contract import ModelRef, Stopped
from stages.models.load import load_causal_lm
from stages.train.stage import Train
from stages.train.vector import task_vector_for
from stages.train.whole import read_whole
from tests.stages.train.conftest import Workbench
from tests.stages.train.test_train_stops import same, weights


def of_experts(kind: str, tokenizer_of: Path, folder: Path, seed: int) -> ModelRef:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    model = made(tiny_config(kind, vocab_size=len(tokenizer), max_position_embeddings=256))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelRef(folder.name, folder, str(folder))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_it_resumes_to_the_same_bits(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    workbench = Workbench(tmp_path, tiny_folder)  # its references are of another model: any numbers will do
    workbench.model = of_experts(kind, tiny_folder, tmp_path / kind, 0)
    settings = {"method": "full", "learning_rate": 1e-2, "epochs": 2, "save_steps": 2}
    whole = workbench.context("whole", **settings)
    list(Train().run(whole))
    halted = workbench.context("halted", stop_at=3, **settings)
    with pytest.raises(Stopped):
        list(Train().run(halted))
    resumed = workbench.context("halted", **settings)
    list(Train().run(resumed))
    assert any(note.startswith("resuming from") for note in resumed.progress.notes)
    assert same(whole, resumed)
    before = load_file(tmp_path / kind / "model.safetensors")
    experts = [name for name in before if ".experts." in name]
    assert experts and all(not torch.equal(before[name], weights(whole)[name]) for name in experts)


def test_a_checkpoint_with_other_names_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_causal_lm(of_experts("mixtral", tiny_folder, tmp_path / "m", 0), torch.float32, torch.device("cpu"))
    model.save_pretrained(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match=r"checkpoint-3 is of another model.*lacks .*mlp\.experts.*has .*experts\.0\."):
        read_whole(model, tmp_path / "checkpoint-3")


def test_the_task_vector_is_of_the_modules_parameters(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sft, base = (of_experts("mixtral", tiny_folder, tmp_path / f"m{seed}", seed) for seed in (1, 0))
    workbench = Workbench(tmp_path, tiny_folder)
    workbench.model = sft
    ctx = workbench.context(method="full", optimizer="ondare", merge={"base": str(base.path), "alpha": 0.1})
    ctx.models = {**ctx.models, "sft": sft, "base": base}
    later, earlier = (load_causal_lm(ref, torch.float32, torch.device("cpu")) for ref in (sft, base))
    vector = task_vector_for(ctx, later)
    assert vector is not None
    for name, parameter in later.named_parameters():
        wanted = (parameter - earlier.get_parameter(name)).detach().bfloat16()
        assert torch.equal(vector.whole(name).bfloat16(), wanted), name
    assert not list((tmp_path / "cache").rglob("*.models"))
