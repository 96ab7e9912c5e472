"""TRL's DPOTrainer, given our token ids and our reference log-probabilities.

Overrides of TRL 1.16 (pinned; tests/stages/train check that the methods are still there):
- `_prepare_dataset`, `_precompute_ref_logps`: rows arrive tokenised, with reference log-probabilities, and are used as
  they are: nothing is tokenised again, truncated or dropped.
- `hash_module` of its module, while a trainer is made: a digest of all weights (seconds per GB, in every process) that only
  TRL's `_precompute_ref_logps` reads.
- `_get_num_items_in_batch`, `compute_loss`: every pair of a step weighs the same, so that the micro-batch size does not
  change the result, not even in the last, smaller batch of an epoch.
- what `resumable.py` names.
What more there may be to a training is a subclass: several processes (`together.py`), updates that are merged or confined
(`confined.py`), losses on some tokens (`allo/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from trl.trainer import dpo_trainer

from stages.train.loss import PreferenceTrainer
from stages.train.resumable import Resumable

ROW_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


class PairTrainer(Resumable, PreferenceTrainer):
    """DPOTrainer on rows of token ids and reference log-probabilities (`ROW_COLUMNS`).

    identity: what the run depends on; only checkpoints with the same identity are resumed from.
    """

    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _weights_unhashed():
            super().__init__(*args, **kwargs)

    def whole_model(self, dtype: torch.dtype) -> Any:
        """The trained model; where it has to be put together, in `dtype`."""
        return self.model

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        missing = [name for name in ROW_COLUMNS if name not in dataset.column_names]
        if missing:
            raise ValueError(f"training rows lack {', '.join(missing)}")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def items(self, batch: Mapping[str, torch.Tensor], own: int | None = None) -> float:
        """What a micro-batch counts for in its optimizer step: its pairs; own: the first so many of them alone."""
        return batch["input_ids"].shape[0] // 2 if own is None else own

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> int:
        """What this optimizer step's loss is a mean over."""
        return int(sum(self.items(batch) for batch in batch_samples))

    def own_loss(self, model: Any, inputs: Mapping[str, Any], own: int, most: int, items: torch.Tensor | int) -> Any:
        """The loss of the first `own` pairs of a micro-batch, as one of processes of which none has more than `most`: pair by pair, the others
        without weight: TRL gathers figures of every forward, so that all must forward equally many."""
        losses = [
            super(PairTrainer, self).compute_loss(model, some_pairs(inputs, [i])) * (i < own) for i in range(most)
        ]
        return torch.stack(losses).sum() * self.args.world_size / items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's mean over the micro-batch, rescaled so that micro-batches sum to the mean over the step's pairs."""
        result = super().compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is None:
            return result
        pairs = inputs["input_ids"].shape[0] // 2
        scale = pairs * self.args.world_size / num_items_in_batch
        return (result[0] * scale, result[1]) if return_outputs else result * scale


@contextmanager
def _weights_unhashed() -> Iterator[None]:
    of_trl = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: "not hashed"
    try:
        yield
    finally:
        dpo_trainer.hash_module = of_trl


def some_pairs(batch: Mapping[str, Any], pairs: Sequence[int]) -> dict[str, Any]:
    """Some pairs of a micro-batch. TRL stacks all chosen sides above all rejected ones; what has one row a pair is cut."""
    of = batch["input_ids"].shape[0] // 2
    sides = [*pairs, *(of + pair for pair in pairs)]

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        return value[sides] if len(value) == 2 * of else value[list(pairs)]

    return {name: cut(value) for name, value in batch.items()}
