"""The length-penalised loss: closed form, sign, TRL's own loss at alpha = 0; equal weight of every pair in a step."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from schemas.config.loss import LossConfig
from stages.train.trainer import PairTrainer

ROWS = {
    "prompt_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13], [4, 4]],
    "chosen_ids": [[20, 21, 22, 23, 24], [30], [31, 32], [40, 41, 42]],
    "rejected_ids": [[25, 26], [27, 28, 29], [33, 34], [43]],
    "ref_chosen_logps": [-20.0, -4.0, -9.5, -13.0],
    "ref_rejected_logps": [-8.0, -12.0, -9.0, -5.0],
}
BETA = 0.3


def trainer_for(
    folder: Path,
    out: Path,
    alpha: float = 0.0,
    cls: type[DPOTrainer] = PairTrainer,
    preference: LossConfig | None = None,
    **arguments: Any,
) -> DPOTrainer:
    """preference: the loss of a PairTrainer, default: DPO with `alpha`."""
    preference = preference or LossConfig(beta=BETA, alpha=alpha)
    if cls is PairTrainer:
        smoothing = {"label_smoothing": preference.smoothing, "discopop_tau": preference.tau}
        arguments = {"loss_type": [preference.in_trl], "beta": preference.beta, **smoothing, **arguments}
    args = DPOConfig(
        output_dir=str(out),
        bf16=False,
        use_cpu=True,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **{"per_device_train_batch_size": 4, "max_steps": 1, "beta": BETA, **arguments},
    )
    extra: dict[str, Any] = {}
    if cls is PairTrainer:
        extra = {"identity": "test", "preference": preference}
    return cls(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_dict(ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **extra,
    )


def batch_loss(trainer: DPOTrainer) -> torch.Tensor:
    columns = [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]
    return trainer.compute_loss(trainer.model.train(), trainer.data_collator(columns))


def closed_form(folder: Path, alpha: float) -> tuple[float, list[float], list[float]]:
    """(loss, rewards of chosen, margins) from plain logits, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def logprob(prompt: list[int], completion: list[int]) -> float:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)
        return sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))

    losses, rewards, margins = [], [], []
    for prompt, chosen, rejected, ref_chosen, ref_rejected in zip(*ROWS.values(), strict=True):
        rewards.append(BETA * (logprob(prompt, chosen) - ref_chosen))
        margins.append(rewards[-1] - BETA * (logprob(prompt, rejected) - ref_rejected))
        x = margins[-1] + alpha * (len(chosen) - len(rejected))
        losses.append(math.log1p(math.exp(-x)))
    return sum(losses) / len(losses), rewards, margins


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.7])
def test_loss_and_logged_rewards_equal_the_closed_form(tiny_folder: Path, tmp_path: Path, alpha: float) -> None:
    trainer = trainer_for(tiny_folder, tmp_path, alpha)
    loss, rewards, margins = closed_form(tiny_folder, alpha)
    assert batch_loss(trainer).item() == pytest.approx(loss, rel=1e-5)
    logged = trainer._metrics["train"]
    assert logged["rewards/chosen"][-1] == pytest.approx(sum(rewards) / 4, rel=1e-4)
    assert logged["rewards/margins"][-1] == pytest.approx(sum(margins) / 4, rel=1e-4)
    assert logged["rewards/accuracies"][-1] == sum(m > 0 for m in margins) / 4


def test_alpha_zero_is_trl_itself(tiny_folder: Path, tmp_path: Path) -> None:
    class Untokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    ours = trainer_for(tiny_folder, tmp_path / "a", 0.0)
    theirs = trainer_for(tiny_folder, tmp_path / "b", cls=Untokenised)
    assert torch.equal(batch_loss(ours), batch_loss(theirs))
    assert ours._metrics["train"] == theirs._metrics["train"]


def test_a_longer_winner_is_pushed_less(tiny_folder: Path, tmp_path: Path) -> None:
    """|dloss/dDelta| = beta * sigmoid(-(beta*Delta + alpha*gap)) falls with alpha when the winner is longer."""

    def push(alpha: float, row: int) -> float:
        trainer = trainer_for(tiny_folder, tmp_path, alpha)
        batch = trainer.data_collator([{name: values[row] for name, values in ROWS.items()}])
        reference = batch["ref_rejected_logps"].requires_grad_()
        trainer.compute_loss(trainer.model, batch).backward()
        return abs(float(reference.grad.sum()))

    assert push(0.2, 0) < push(0.0, 0)  # 5 tokens against 2
    assert push(0.2, 1) > push(0.0, 1)  # 1 token against 3
    assert push(0.2, 2) == pytest.approx(push(0.0, 2), rel=1e-6)  # equally long


@pytest.mark.parametrize("preference", [{"alpha": 0.1}, {"nll": 0.5}, {"type": "simpo", "nll": 0.5}], ids=str)
def test_every_pair_of_a_step_weighs_the_same_whatever_the_micro_batch(
    tiny_folder: Path, tmp_path: Path, preference: dict[str, Any]
) -> None:
    """4 pairs in one step as 4, as 3 + 1 and as 1 + 1 + 1 + 1: equal gradients, so equal weights after the step."""
    after = []
    for micro, accumulation in ((4, 1), (3, 2), (1, 4)):
        trainer = trainer_for(
            tiny_folder,
            tmp_path / str(micro),
            preference=LossConfig(beta=BETA, **preference),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            seed=1,
            data_seed=1,
        )
        gradients: dict[str, torch.Tensor] = {}

        def keep(optimizer: Any, args: Any, kwargs: Any, found: Any = gradients, model: Any = trainer.model) -> None:
            found.update({n: p.grad.clone() for n, p in model.named_parameters()})

        trainer.create_optimizer().register_step_pre_hook(keep)
        trainer.train()
        after.append(gradients)
    for other in after[1:]:
        for name, gradient in after[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_logged_loss_of_a_step_is_the_mean_over_its_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(
        tiny_folder, tmp_path, 0.1, per_device_train_batch_size=3, gradient_accumulation_steps=2, logging_steps=1
    )
    trainer.train()
    loss, _, _ = closed_form(tiny_folder, 0.1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_methods_we_override_still_exist_in_trl() -> None:
    for name in ("_prepare_dataset", "_precompute_ref_logps", "_compute_loss", "compute_loss", "create_model_card"):
        assert callable(getattr(DPOTrainer, name)), name
    for name in ("_get_num_items_in_batch", "create_optimizer", "_save", "_save_checkpoint", "_send_telemetry"):
        assert callable(getattr(DPOTrainer, name)), name
    assert "model(**model_kwargs, labels=labels, fused_lm_head=True)" in inspect.getsource(DPOTrainer._compute_loss)
    readers = [name for name, of in vars(DPOTrainer).items() if "_precompute_model_hash" in source_of(of)]
    assert sorted(readers) == ["__init__", "_precompute_ref_logps"]


def source_of(member: Any) -> str:
    return inspect.getsource(member) if inspect.isfunction(member) else ""


def test_the_weights_are_not_hashed(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds per GB, in every process and every phase, for a digest that nobody reads."""
    hashed: list[Any] = []
    monkeypatch.setattr(dpo_trainer, "hash_module", hashed.append)
    trainer_for(tiny_folder, tmp_path)
    assert not hashed and dpo_trainer.hash_module == hashed.append  # and it is put back


def test_rows_without_reference_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(tiny_folder, tmp_path)
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        trainer._prepare_dataset(Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]}))
