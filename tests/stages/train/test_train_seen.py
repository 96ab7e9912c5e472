"""What the cards and figures say was learnt from is what the trainers were given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from schemas.config.training import TrainConfig
from stages.train.batches import plan_batches
from stages.train.seen import rows_seen
from stages.train.stage import Train
from stages.train.trainer import PairTrainer


def watched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Prompt and chosen answer of every pair whose loss is taken."""
    texts: set[tuple[int, ...]] = set()
    loss = PairTrainer.compute_loss

    def watching(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        half = len(inputs["input_ids"]) // 2
        for ids, mask in zip(inputs["input_ids"][:half], inputs["attention_mask"][:half], strict=True):
            texts.add(tuple(ids[mask.bool()].tolist()))
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", watching)
    return texts


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_the_pairs_counted_are_those_whose_loss_was_taken(
    workbench: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, max_steps: int
) -> None:
    texts = watched(monkeypatch)
    ctx = workbench.context(batch_size=batch_size, max_steps=max_steps)
    *_, account = Train().run(ctx)
    rows = {}
    for row in workbench.read("curated").to_pylist():
        ids = workbench.renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        rows[(*ids.prompt, *ids.chosen)] = row["language"]
    seen = [rows[text] for text in texts]
    assert account.stats["pairs_seen"] == len(seen) == min(6, batch_size * max_steps)
    for name in ("model", "adapter"):
        card = (ctx.folder / name / "README.md").read_text(encoding="utf-8")
        assert f"| all | {len(seen)} |" in card
        for language in set(seen):
            assert f"| {language} | {seen.count(language)} |" in card
        assert ("it ended inside its first pass" in card) == (len(seen) < 6)
    assert [(t.language, t.kept) for t in account.tallies] == [("de", 3), ("en", 3)]


def test_a_whole_pass_saw_everything_and_a_batch_of_all_too() -> None:
    for settings in ({"epochs": 1.0}, {"max_steps": 4}, {"batch_size": 32, "max_steps": 1}):
        config = TrainConfig.model_validate({"batch_size": 2, **settings})
        plan = plan_batches(7, config)
        assert rows_seen(7, plan, config.batch_size, 3) == list(range(7))


def test_pairs_of_several_objectives_are_counted_once(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = watched(monkeypatch)
    objectives = [{"name": name, "where": "language = 'en'"} for name in ("one", "other")]
    ctx = workbench.context(orthalign={"objectives": objectives}, batch_size=2, max_steps=1)
    *_, account = Train().run(ctx)
    assert account.stats["pairs_seen"] == len(texts) <= 3


def test_a_warm_up_that_is_undone_taught_nothing(workbench: Any) -> None:
    allo = {"mask": "gradient", "warmup_steps": 3, "forget": False, "key_fraction": 1.0, "allow_empty_layers": True}
    *_, account = Train().run(workbench.context(method="full", allo=allo, batch_size=2, max_steps=1))
    assert account.stats["pairs_seen"] == 2 and account.stats["steps"] == 4
