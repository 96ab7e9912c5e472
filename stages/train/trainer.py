"""TRL's DPOTrainer, given our token ids, our reference log-probabilities and our optimizer.

Overrides of TRL 1.16 (pinned; tests/stages/train check that the methods are still there):
- `_prepare_dataset`, `_precompute_ref_logps`: rows arrive tokenised, with reference log-probabilities, and are used as
  they are: nothing is tokenised again, truncated or dropped.
- `_get_num_items_in_batch`, `compute_loss`: every pair of a step weighs the same, so that the micro-batch size does not
  change the result, not even in the last, smaller batch of an epoch.
- `create_optimizer`: `build_optimizer`, also under FSDP; `log`: what the merge did.
- `_set_signature_columns_if_needed`, the collator: `key_tokens`, where rows have them, restrict the rejected side (train/allo).
- what `resumable.py` names; `_save`: whole tensors.
- `_prepare_for_training`, `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler`: a model cut over several processes
  (`sharding.py`), by the way transformers has for a model that was cut before; its checkpoints hold whole tensors.
- `get_batch_samples`: of several processes; the pairs accelerate repeats to make an epoch's last batches even weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from schemas.config.training import TrainConfig
from stages.train.allo.collators import KeyTokens
from stages.train.loss import LengthPenalisedDPOTrainer
from stages.train.optimizers import ActiveEntries, OnlineMergingAdamW, TaskVector
from stages.train.optimizers.build import build_optimizer
from stages.train.optimizers.confine import MASKED
from stages.train.optimizers.state import gathered_state, scattered_state
from stages.train.optimizers.subspace import Protected
from stages.train.resumable import Resumable
from stages.train.sharding import shard, unsharded, whole_weights

ROW_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
OWN = "own"
"""(this process's own pairs, the most of any process) of a micro-batch whose other pairs accelerate repeated to fill it."""
TOKEN_COLUMNS = ("key_tokens", "token_weights", "ref_token_logps")


class PairTrainer(Resumable, LengthPenalisedDPOTrainer):
    """DPOTrainer on rows of token ids and reference log-probabilities (`ROW_COLUMNS`).

    identity: what the run depends on; only checkpoints with the same identity are resumed from.
    task_vector: what `train.optimizer` merges with. protected: subspaces no update enters. active: entries that are trained.
    sharded: the weights are cut over the processes.
    """

    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        train_config: TrainConfig,
        identity: str,
        task_vector: TaskVector | None = None,
        protected: Protected | None = None,
        sharded: bool = False,
        active: ActiveEntries | None = None,
        **kwargs: Any,
    ) -> None:
        self.train_config = train_config
        self.identity = identity
        self.task_vector = task_vector
        self.protected = protected
        self.sharded = sharded
        self._empty: torch.nn.Module | None = None
        self.active = ActiveEntries({}) if active is None else active
        super().__init__(*args, **kwargs)
        self.data_collator = self.collator(self.data_collator)

    def collator(self, whole: Any) -> Any:
        """What makes batches of rows; whole: TRL's, of whole pairs."""
        return KeyTokens(whole)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train or resume, only the active entries."""
        model: Any = self.model
        with self.active.on_gradients(model.named_parameters()):  # before gradients are clipped
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, *TOKEN_COLUMNS]))

    def whole_model(self) -> Any:
        """The trained model, in one piece; of a sharded one without its weights in processes that do not write. Collective."""
        return self.model if self._empty is None else unsharded(self.model, self._empty, keep=self.args.should_save)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.sharded:
            self._empty = shard(self.model, self.args.device)
            self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The step's micro-batches of this process; the last of an uneven epoch says how many of its pairs are not repeated."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        size, processes = self.args.per_device_train_batch_size, self.args.world_size
        uneven = len(self.train_dataset) % (size * processes)
        if processes > 1 and uneven and batches and self.accelerator.gradient_state.end_of_dataloader:
            mine = min(max(uneven - self.args.process_index * size, 0), size)
            batches[-1] = {**batches[-1], OWN: (mine, min(uneven, size))}
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        missing = [name for name in ROW_COLUMNS if name not in dataset.column_names]
        if missing:
            raise ValueError(f"training rows lack {', '.join(missing)}")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> int:
        """Pairs in this optimizer step, over all devices."""
        pairs = sum(int(b[OWN][0]) if OWN in b else b["input_ids"].shape[0] // 2 for b in batch_samples)
        if self.args.world_size > 1:
            return int(self.accelerator.gather(torch.tensor([pairs], device=device)).sum())
        return pairs

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's mean over the micro-batch, rescaled so that micro-batches sum to the mean over the step's pairs.

        A filled-up micro-batch goes pair by pair, repeated ones without weight: TRL gathers figures of every forward, so that the
        processes must forward equally many pairs.
        """
        if OWN in inputs:
            assert num_items_in_batch is not None and not return_outputs
            own, most = inputs.pop(OWN)
            losses = [
                super(PairTrainer, self).compute_loss(model, one_pair(inputs, i)) * (i < own) for i in range(most)
            ]
            return torch.stack(losses).sum() * self.args.world_size / num_items_in_batch
        result = super().compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is None:
            return result
        pairs = inputs["input_ids"].shape[0] // 2
        scale = pairs * self.args.world_size / num_items_in_batch
        return (result[0] * scale, result[1]) if return_outputs else result * scale

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `stages/train/optimizers` over the model as it is wrapped now."""
        if self.optimizer is None:
            wrapped: Any = self.model if model is None else model
            self.optimizer = build_optimizer(
                wrapped, self.train_config, self.task_vector, self.args.seed, self.protected, self.active
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the numbers of this step's merge, when it was one of its turns."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if "loss" in logs and isinstance(optimizer, OnlineMergingAdamW):
            found = sorted(optimizer.telemetry.items())
            logs = logs | {f"{'mask' if name in MASKED else 'merge'}/{name}": value for name, value in found}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._empty is not None:
            state_dict = whole_weights(self.model, keep=self.args.should_save)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._empty is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = gathered_state(self.optimizer.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._empty is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        read = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
        state = scattered_state(self.optimizer.optimizer, read(Path(checkpoint, OPTIMIZER_NAME)))
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(read(Path(checkpoint, SCHEDULER_NAME)))


def one_pair(batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One pair of a micro-batch. TRL stacks all chosen sides above all rejected ones; what has one row a pair is cut."""
    pairs = batch["input_ids"].shape[0] // 2

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        return value[index::pairs] if len(value) == 2 * pairs else value[index : index + 1]

    return {name: cut(value) for name, value in batch.items()}
