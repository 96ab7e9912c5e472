"""Log-probabilities computed for training are those of the trainer's own forward, whatever its numbers; memory is asked once."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.contract import Context, Rows, Stopped
from stages.gradients.rows import BatchRow
from stages.train import scoring
from stages.train.allo.rewards import model_rewards
from stages.train.model import precision
from stages.train.references import recomputed
from stages.train.scoring import Scorer
from stages.train.session import Session
from stages.train.stage import Train

BFLOAT16 = {"execution": {"deterministic": False, "device": "cpu"}}


def bfloat16(workbench: Any, folder: str = "train", **settings: Any) -> Context:
    sections = {"model": {"policy": str(workbench.policy), "dtype": "bfloat16"}, **BFLOAT16}
    return workbench.context(folder, sections=sections, method="full", epochs=1, **settings)


def spoil(workbench: Any) -> None:
    """References that do not hold, so that all are computed again."""
    table = workbench.read("gradients")
    column = table.schema.get_field_index("ref_logp_chosen")
    off = pa.array([v - 50.0 for v in table["ref_logp_chosen"].to_pylist()], pa.float32())
    workbench.write("gradients", table.set_column(column, table.schema.field(column), off))


def first(ctx: Context, *names: str) -> list[float]:
    """The first value of each metric."""
    rows, _ = Train().run(ctx)
    assert isinstance(rows, Rows)
    metrics = rows.data.to_pylist()
    return [next(row["value"] for row in metrics if row["name"] == name) for name in names]


def test_under_autocast_dpo_starts_at_no_margin(workbench: Any) -> None:
    spoil(workbench)
    ctx = bfloat16(workbench)
    margin, loss = first(ctx, "rewards/margins", "loss")
    assert any("computed again" in note for note in ctx.progress.notes)
    assert margin == pytest.approx(0, abs=1e-6) and loss == pytest.approx(math.log(2), abs=1e-6)


def test_under_autocast_forgetting_and_the_learning_after_it_start_at_no_ratio(workbench: Any) -> None:
    allo = {"mask": "warmup", "warmup_steps": 1, "allow_empty_layers": True, "key_fraction": 0.4}
    ctx = bfloat16(workbench, allo=allo, micro_batch_size=3)
    ratio, margin = first(ctx, "allo/forget/log_ratio", "rewards/margins")
    assert (ratio, margin) == pytest.approx((0, 0), abs=1e-6)
    assert "phase forget: train.micro_batch_size reduced to train.batch_size (2)" in ctx.progress.notes


def test_a_reward_model_with_the_weights_of_the_reference_rewards_nothing(workbench: Any) -> None:
    allo = {"mask": "warmup", "token_reward": "dpo_model", "reward_model": str(workbench.policy)}
    ctx = bfloat16(workbench, allo=allo)
    ctx.models["token_reward"] = workbench.model
    numbers, rows = precision(ctx.config, ctx.config.train), [BatchRow((3, 4, 5), tuple(range(6, 60)))]
    policy = AutoModelForCausalLM.from_pretrained(workbench.policy, dtype=numbers.load)
    references = Scorer.of(ctx, numbers).token_logps(policy, rows)
    (reward,) = model_rewards(Session.of(ctx, ctx.config.train, workbench.model), rows, references)
    assert set(reward.tolist()) == {0.5}


class Pairs:
    """As many pairs as wanted, all alike; keeps the references it is given."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int) -> Any:
        return self

    @property
    def rows(self) -> list[BatchRow]:
        return [BatchRow((1,), (2, 3)), BatchRow((1,), (4,))]

    def with_references(self, references: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return references


def test_recomputing_shows_its_progress_and_stops(workbench: Any) -> None:
    ctx = workbench.context(stop_at=1)
    ctx.progress.stop_unit = "reference answer"
    with pytest.raises(Stopped):
        recomputed(
            Pairs(300),
            AutoModelForCausalLM.from_pretrained(workbench.policy),
            Scorer.of(ctx, precision(ctx.config, ctx.config.train)),
        )  # type: ignore[arg-type]
    assert ctx.progress.units == [(600, "reference answer")] and 1 <= ctx.progress.done <= 256


def test_memory_that_ran_out_is_remembered_by_the_run(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def scored(model: Any, rows: list[BatchRow], budget: Any, done: Any) -> list[torch.Tensor]:
        def compute(indices: list[int]) -> list[torch.Tensor]:
            sizes.append(len(indices))
            if len(indices) > 20:
                raise torch.OutOfMemoryError("out of memory")
            return [torch.zeros(1) for _ in indices]

        return budget.run([len(row) for row in rows], compute)

    monkeypatch.setattr(scoring, "logprobs_of_rows", scored)
    ctx = workbench.context(sections={"gradients": {"token_budget": 80}})
    for _ in range(2):
        found: Any = recomputed(Pairs(300), None, Scorer.of(ctx, precision(ctx.config, ctx.config.train)))  # type: ignore[arg-type]
        assert len(found) == 300
    assert sum(size > 20 for size in sizes) == 1
    assert ctx.limits["gradients.token_budget"] < 80
    assert sum("gradients.token_budget" in note for note in ctx.progress.notes) == 1
