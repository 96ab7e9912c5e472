"""The train stage on a tiny model: result on disk, resume, stopping, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer import safe_globals

from schemas import files
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import Account, Context, ModelRef, Rows, Stopped
from stages.train.checkpoints import MARKER
from stages.train.stage import Train
from stages.train.trainer import PairTrainer


def train(ctx: Context) -> tuple[pa.Table, Account]:
    outputs = list(Train().run(ctx))
    assert [type(o) for o in outputs] == [Rows, Account]
    return outputs[0].data, outputs[1]


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_prefers_chosen_and_leaves_a_loadable_model(workbench: Any, method: str) -> None:
    ctx = workbench.context(method=method, epochs=8, report_to=["tensorboard"])
    metrics, account = train(ctx)
    folder = ctx.folder
    assert metrics.schema.equals(TABLES["metrics"].schema)
    rows = metrics.to_pylist()
    losses = [r["value"] for r in rows if r["name"] == "loss"]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy = reference: log 2
    assert losses[-1] < 0.5 and len(losses) == 24
    assert [r["value"] for r in rows if r["name"] == "rewards/accuracies"][-1] == 1.0
    assert [(t.language, t.rows_in, t.kept) for t in account.tallies] == [("de", 3, 3), ("en", 3, 3)]
    assert {p.relative_to(folder).as_posix() for p in account.artifacts} >= {
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "model/README.md",
    }
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() == (method == "lora")
    assert list((folder / "logs").glob("events.out.tfevents*"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    gained = logprob_gap(workbench, model) - logprob_gap(
        workbench, AutoModelForCausalLM.from_pretrained(workbench.policy, dtype=torch.float32)
    )
    assert gained > 1.0
    assert ctx.progress.units == [(24, "step")] and ctx.progress.done == 24


def logprob_gap(workbench: Any, model: Any) -> float:
    """Mean over pairs of s(chosen) - s(rejected)."""
    rows = workbench.read("curated").to_pylist()
    renderer = workbench.renderer
    gaps = []
    for row in rows:
        ids = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        sides = []
        for completion in (ids.chosen, ids.rejected):
            with torch.no_grad():
                logps = model(torch.tensor([ids.prompt + completion])).logits[0].log_softmax(-1)
            sides.append(sum(float(logps[len(ids.prompt) - 1 + t, c]) for t, c in enumerate(completion)))
        gaps.append(sides[0] - sides[1])
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run_resumes_to_the_same_weights_and_metrics(workbench: Any, method: str) -> None:
    whole = workbench.context("whole", method=method, save_steps=2)
    metrics, _ = train(whole)
    halted = workbench.context("halted", method=method, save_steps=2, stop_at=3)
    with pytest.raises(Stopped):
        train(halted)
    assert not (halted.folder / "model").exists()
    resumed = workbench.context("halted", method=method, save_steps=2)
    again, _ = train(resumed)
    assert "resuming from checkpoint-4" in resumed.progress.notes
    assert resumed.progress.units == [(2, "step")]
    assert same(weights(whole), weights(resumed))
    assert metrics.equals(again)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_in_its_last_step_it_takes_no_further_one(workbench: Any, method: str) -> None:
    """max_steps ends inside an epoch, the learning rate is not 0 there, and the checkpoint is of the last step."""
    settings = {"method": method, "max_steps": 2, "schedule": "constant", "save_steps": 1}
    whole = workbench.context("whole", **settings)
    metrics, _ = train(whole)
    with pytest.raises(Stopped):
        train(workbench.context("halted", **settings, stop_at=1))
    assert (workbench.root / "halted/checkpoints/checkpoint-2").exists()
    resumed = workbench.context("halted", **settings)
    again, account = train(resumed)
    assert same(weights(whole), weights(resumed)) and metrics.equals(again)
    assert account.stats["steps"] == 2


def test_a_half_written_checkpoint_is_skipped(workbench: Any) -> None:
    whole = workbench.context("whole", save_steps=2)
    train(whole)
    crashed = workbench.context("crashed", save_steps=2, stop_at=3)
    with pytest.raises(Stopped):
        train(crashed)
    checkpoints = crashed.folder / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    (checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    left = [files.temporary_beside(crashed.folder / "model"), files.temporary_beside(checkpoints / "whole")]
    left[0].mkdir()
    left[1].touch()
    resumed = workbench.context("crashed", save_steps=2)
    train(resumed)
    assert any("checkpoint-4" in note and "removed" in note for note in resumed.progress.notes)
    assert "resuming from checkpoint-2" in resumed.progress.notes
    assert same(weights(whole), weights(resumed))
    assert not any(path.exists() for path in left), "what a kill left of an export"


def test_checkpoints_hold_no_pickled_arguments_and_a_marker(workbench: Any) -> None:
    ctx = workbench.context(save_steps=3)
    train(ctx)
    names = {p.name for p in (ctx.folder / "checkpoints" / "checkpoint-6").iterdir()}
    assert MARKER in names and "adapter_model.safetensors" in names
    assert "training_args.bin" not in names
    archives = [p for p in ctx.folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin")]
    assert {p.name for p in archives} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    with safe_globals():  # as transformers reads them: tensors, numbers and numpy arrays only
        for file in archives:
            torch.load(file, weights_only=True)


def test_another_configuration_does_not_resume(workbench: Any) -> None:
    with pytest.raises(Stopped):
        train(workbench.context(save_steps=1, stop_at=1))
    ctx = workbench.context(save_steps=1, learning_rate=2e-2)
    train(ctx)
    assert not any("resuming" in note for note in ctx.progress.notes)
    assert ctx.progress.done == 6


def test_the_micro_batch_may_change_between_a_stop_and_its_resume(workbench: Any) -> None:
    whole = workbench.context("whole", micro_batch_size=1)
    train(whole)
    with pytest.raises(Stopped):
        train(workbench.context("halted", micro_batch_size=1, stop_at=2))
    resumed = workbench.context("halted", micro_batch_size=2)
    train(resumed)
    assert any("resuming" in note for note in resumed.progress.notes)
    ours, theirs = weights(resumed), weights(whole)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_seed_and_round_change_the_order_and_nothing_else_does(workbench: Any) -> None:
    base, again = workbench.context("a"), workbench.context("b")
    train(base)
    train(again)
    assert same(weights(base), weights(again))
    for index, kwargs in enumerate(({"round_": 1}, {"sections": {"seed": 7}})):
        other = workbench.context(f"c{index}", **kwargs)
        train(other)
        assert not same(weights(base), weights(other))


def test_stored_references_are_checked_and_recomputed_aloud_when_wrong(workbench: Any) -> None:
    ctx = workbench.context("right")
    right, _ = train(ctx)
    assert not any("reference log-prob" in note for note in ctx.progress.notes)
    table = workbench.read("gradients")
    column = table.schema.get_field_index("ref_logp_chosen")
    off = pa.array([v - 5.0 for v in table["ref_logp_chosen"].to_pylist()], pa.float32())
    workbench.write("gradients", table.set_column(column, table.schema.field(column), off))
    ctx = workbench.context("wrong")
    recomputed, _ = train(ctx)
    assert any("computed again" in note for note in ctx.progress.notes)
    losses = [[r["value"] for r in m.to_pylist() if r["name"] == "loss"] for m in (right, recomputed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_reference_may_be_another_model_than_the_start(workbench: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(workbench.policy, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(other)
    rows = workbench.read("curated").to_pylist()
    workbench.write("gradients", workbench.gradients(rows, other))
    ctx = workbench.context()
    ctx = replace(ctx, models={**ctx.models, "reference": ModelRef("initial", other, "digest-of-other")})
    metrics, _ = train(ctx)
    assert not any("reference log-prob" in note for note in ctx.progress.notes)
    first = next(r["value"] for r in metrics.to_pylist() if r["name"] == "loss")
    assert abs(first - 0.6931) > 1e-3
    assert "initial" in (ctx.folder / "model" / "README.md").read_text()


def test_a_pair_whose_ids_changed_is_refused(workbench: Any) -> None:
    table = workbench.read("gradients")
    column = table.schema.get_field_index("ids_hash")
    hashes = ["0" * 32, *table["ids_hash"].to_pylist()[1:]]
    workbench.write("gradients", table.set_column(column, table.schema.field(column), pa.array(hashes)))
    with pytest.raises(UserError, match="pair0"):
        train(workbench.context())


def test_a_pair_without_a_gradient_is_refused(workbench: Any) -> None:
    workbench.write("gradients", workbench.read("gradients").slice(1))
    with pytest.raises(UserError, match="pair0"):
        train(workbench.context())


def test_empty_curated_is_refused(workbench: Any) -> None:
    workbench.write("curated", workbench.read("curated").slice(0, 0))
    with pytest.raises(UserError, match="nothing to train on"):
        train(workbench.context())


def test_a_pair_over_the_length_limit_is_refused_not_truncated(workbench: Any) -> None:
    with pytest.raises(UserError, match=r"text\.max_length"):
        train(workbench.context(sections={"text": {"max_length": 16}}))


@pytest.mark.parametrize("target", ["lm_head", "no_such_layer"])
def test_lora_on_the_head_or_on_nothing_is_refused(workbench: Any, target: str) -> None:
    with pytest.raises(UserError, match=target):
        train(workbench.context(lora={"target_modules": [target]}))


def test_the_pairs_of_a_step_are_counted_once(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    count = PairTrainer._get_num_items_in_batch

    def counting(*arguments: Any) -> int:
        counted.append(count(*arguments))
        return counted[-1]

    monkeypatch.setattr(PairTrainer, "_get_num_items_in_batch", counting)
    train(workbench.context(epochs=1))
    assert counted == [2, 2, 2]


def test_running_out_of_memory_says_what_to_do(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(PairTrainer, "compute_loss", full)
    with pytest.raises(UserError, match="ran out of memory: CUDA out of memory") as error:
        train(workbench.context())
    assert "train.micro_batch_size" in error.value.fix and "more" not in str(error.value)


def test_a_loss_that_is_not_a_number_is_refused(workbench: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(workbench.policy, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    broken = workbench.root / "broken"
    model.save_pretrained(broken)
    workbench.renderer.tokenizer.save_pretrained(broken)
    ctx = workbench.context()
    ref = ModelRef("broken", broken, "digest-of-broken")
    with pytest.raises(UserError, match="nan"):
        train(replace(ctx, models={"policy": ref, "reference": ref}))


def test_the_card_is_honest_and_its_text_inert(workbench: Any) -> None:
    ctx = workbench.context(sections={"banner": "![x](http://evil) <script>", "loss": {"alpha": 0.01}})
    ref = replace(workbench.model, name="b_c](x)")
    train(replace(ctx, models={"policy": ref, "reference": ref}))
    card = (ctx.folder / "model" / "README.md").read_text()
    assert "| de | 3 |" in card and "| all | 6 |" in card
    assert "| 0.01 |" in card and "2503.23777" in card and "\\" not in card
    assert "<script>" not in card and "](http" not in card and "b_c&#93;(x)" in card
    assert str(workbench.root) not in card


ALLO = {"mask": "warmup", "warmup_steps": 1, "forget": False, "allow_empty_layers": True}
OBJECTIVES = {"objectives": [{"name": code, "where": f"language = '{code}'"} for code in ("en", "de")]}


@pytest.mark.parametrize("settings", [{"orthalign": OBJECTIVES}, {"method": "full", "allo": ALLO}])
def test_every_file_that_training_leaves_has_the_umasks_permissions(workbench: Any, settings: dict[str, Any]) -> None:
    before = os.umask(0o027)
    try:
        ctx = workbench.context(**settings, max_steps=1, save_steps=1)
        train(ctx)
    finally:
        os.umask(before)
    files = [p for p in ctx.folder.rglob("*") if p.is_file()]
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in files if p.stat().st_mode & 0o777 != 0o640} == {}
    assert sum(p.suffix == ".safetensors" for p in files) > 2


def test_lora_dropout_is_really_used(workbench: Any) -> None:
    plain, dropped = workbench.context("a"), workbench.context("b", lora={"dropout": 0.5})
    train(plain)
    train(dropped)
    assert not same(weights(plain), weights(dropped))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "full", "lora": {"r": 8}}, "train.lora.r has no use with train.method: full"),
        ({"sections": {"sft": {"epochs": 2}}}, r"sft\.epochs has no use with sft\.sources: \[\]"),
        (
            {"sections": {"sft": {"sources": [{"path": "t.jsonl"}], "lora": {"r": 8}}}},
            "sft.lora.r has no use with sft.method: full",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(workbench: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        workbench.context(**settings)


def test_settings_at_their_defaults_are_no_settings_and_log_every_is_also_of_masks(workbench: Any) -> None:
    workbench.context(method="full", lora={"r": 16}, sections={"sft": {"epochs": 1}})
    workbench.context(method="full", merge={"log_every": 1}, allo={"mask": "warmup"})


def test_bfloat16_is_the_dtype_of_the_result(workbench: Any) -> None:
    sections = {
        "model": {"policy": str(workbench.policy), "dtype": "bfloat16"},
        "execution": {"deterministic": False, "device": "cpu"},
    }
    for method in ("lora", "full"):
        ctx = workbench.context(method, method=method, sections=sections, epochs=1)
        train(ctx)
        assert {t.dtype for t in weights(ctx).values()} == {torch.bfloat16}
        state = torch.load(ctx.folder / "checkpoints" / "checkpoint-3" / "optimizer.pt", weights_only=True)
        assert {v["exp_avg"].dtype for v in state["state"].values()} == {torch.float32}
