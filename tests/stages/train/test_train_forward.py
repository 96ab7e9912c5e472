"""What is trained is the loss alone: no dropout of the model's own, no noise of routers, no balancing loss, and TRL's forward is the model's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.tiny_models import tiny_config
from benchmarks.tiny_models import tiny_model as made
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.gradients.batching import TokenBudget
from stages.gradients.rows import BatchRow
from stages.sft.stage import Sft
from stages.train.forward import check_forward, make_plain
from stages.train.model import Precision
from stages.train.scoring import Scorer
from stages.train.stage import Train
from tests.stages.train.conftest import Workbench

ROWS = [BatchRow((11, 5, 23, 8), (9, 31, 7, 12, 19)), BatchRow((33, 45), (61, 30))]
SETTINGS: dict[str, dict[str, Any]] = {
    "granite": {"attention_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.2},
    "qwen3_moe": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "granitemoe": {"output_router_logits": True},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3},
    "recurrent_gemma": {"logits_soft_cap": 0.5},
}


def saved(kind: str, tokenizer_of: Path, folder: Path) -> ModelRef:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = tiny_config(kind, vocab_size=len(tokenizer), max_position_embeddings=256, **SETTINGS.get(kind, {}))
    model = made(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelRef(kind, folder, str(folder))


def scorer() -> Scorer:
    numbers = Precision(torch.device("cpu"), torch.float32, torch.float32)
    return Scorer(numbers, TokenBudget(1000), lambda rows, unit: lambda done: None)


def metric(table: Any, name: str) -> list[float]:
    rows = sorted(table.filter([one == name for one in table["name"].to_pylist()]).to_pylist(), key=lambda r: r["step"])
    return [row["value"] for row in rows]


def trained(workbench: Workbench, folder: str, **settings: Any) -> Any:
    ctx = workbench.context(folder, learning_rate=1e-2, epochs=1, **settings)
    (table,) = (item.data for item in Train().run(ctx) if hasattr(item, "data"))
    return ctx, table


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_it_starts_at_log_2_and_the_config_comes_back(
    kind: str, method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    workbench = Workbench(tmp_path, tiny_folder)  # its references are of another model: they are computed again
    workbench.model = saved(kind, tiny_folder, tmp_path / kind)
    before = AutoConfig.from_pretrained(tmp_path / kind).to_dict()
    losses = []
    for micro in (1, 2):
        ctx, table = trained(workbench, f"{method}{micro}", method=method, micro_batch_size=micro)
        assert metric(table, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
        assert not any("aux" in name for name in set(table["name"].to_pylist()))
        losses.append(metric(table, "loss"))
        after = AutoConfig.from_pretrained(ctx.folder / "model").to_dict()
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed <= {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_finetuning_gives_the_config_back_too(tiny_folder: Path, tmp_path: Path) -> None:
    workbench = Workbench(tmp_path, tiny_folder)
    workbench.model = saved("qwen3_moe", tiny_folder, tmp_path / "m")
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"prompt": "Say it", "completion": "so it is", "language": "en"}) + "\n"
    )
    sections = {"sft": {"sources": [{"path": str(tmp_path / "t.jsonl")}], "max_steps": 1, "batch_size": 1}}
    ctx = workbench.context("sft", sections=sections)
    ctx.models = {"start": workbench.model}
    list(Sft().run(ctx))
    after = json.loads((ctx.folder / "model/config.json").read_text())
    assert (after["output_router_logits"], after["router_aux_loss_coef"]) == (True, 0.5)


def test_a_forward_that_is_not_the_models_own_is_refused(tiny_folder: Path) -> None:
    model = made(tiny_config("recurrent_gemma", vocab_size=100, logits_soft_cap=0.5))
    add_fused_lm_head(model)
    with pytest.raises(UserError, match=r"RecurrentGemmaForCausalLM differs in TRL's forward from the model's own"):
        check_forward(scorer().token_logps(model, ROWS), model, ROWS, scorer(), "train")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_whose_noise_cannot_be_turned_off_is_refused(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    workbench = Workbench(tmp_path, tiny_folder)
    workbench.model = saved("phimoe", tiny_folder, tmp_path / "m")  # its noise decides which experts answer
    with pytest.raises(UserError, match=r"PhimoeForCausalLM (differs|cannot run) in TRL's forward"):
        trained(workbench, method, method=method)


def test_a_model_that_draws_while_it_trains_is_refused(tiny_folder: Path) -> None:
    model = made(tiny_config("llama", vocab_size=100))
    make_plain(model)
    add_fused_lm_head(model)
    before = scorer().token_logps(model, ROWS)
    check_forward(before, model, ROWS, scorer(), "train")
    model.model.norm.register_forward_hook(
        lambda module, args, out: out + torch.randn_like(out) if module.training else out
    )
    with pytest.raises(UserError, match="differs in TRL's forward from itself") as error:
        check_forward(before, model, ROWS, scorer(), "sft")
    assert error.value.where == "sft"


def test_a_model_that_trls_forward_cannot_run_is_refused(tiny_folder: Path) -> None:
    model = made(tiny_config("granitemoe", vocab_size=100, output_router_logits=True))
    add_fused_lm_head(model)
    with pytest.raises(UserError, match=r"cannot run in TRL's forward \(AttributeError: .*num_experts"):
        check_forward(scorer().token_logps(model, ROWS), model, ROWS, scorer(), "train")


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        CalledProcessError(1, ["gcc", "main.c"]),
    ],
    ids=["none", "without headers"],
)
def test_kernels_that_cannot_be_compiled_are_no_fault_of_the_model(raised: Exception) -> None:
    def failing(**inputs: Any) -> Any:
        raise raised

    model = made(tiny_config("llama"))
    before = scorer().token_logps(model, ROWS)
    model.forward = failing
    with pytest.raises(UserError, match=r"could not compile its kernels for the GPU .* python3-dev"):
        check_forward(before, model, ROWS, scorer(), "train")
    model.forward = lambda **inputs: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        check_forward(before, model, ROWS, scorer(), "train")
