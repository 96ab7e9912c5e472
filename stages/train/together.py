"""What a trainer does otherwise as one of several processes: uneven batches, a model that is cut over them.

Overrides of transformers 5.19 and accelerate 1.15:
- `get_batch_samples`: the pairs accelerate repeats to make an epoch's last batches even weigh nothing.
- `_prepare_for_training`, `_load_from_checkpoint`, `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler`: a model cut over several processes
  (`sharding.py`), by the way transformers has for a model that was cut before; its checkpoints hold whole tensors. `_save`: so do
  its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from stages.models.folder import weight_files
from stages.models.load import widen
from stages.train.optimizers.state import gathered_state, scattered_state
from stages.train.sharding import mesh_over, shard, unsharded, whole_weights
from stages.train.trainer import PairTrainer

OWN = "own"
"""(this process's own pairs, the most of any process) of a micro-batch whose other pairs accelerate repeated to fill it."""


def together(kind: type[PairTrainer], copies: int) -> type[PairTrainer]:
    """The trainer as one of several processes. copies: of the weights, which are cut over the processes that share one; 0: each has its own."""
    mixins = (_Sharded, _Uneven) if copies else (_Uneven,)
    return type(f"{kind.__name__}Together", (*mixins, kind), {"copies": copies})


class _Uneven(PairTrainer):
    """A share of every step's pairs; every pair of a step weighs the same, wherever it is."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The step's micro-batches of this process; the last of an uneven epoch says how many of its pairs are not repeated."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        size, processes = self.args.per_device_train_batch_size, self.args.world_size
        uneven = len(self.train_dataset) % (size * processes)
        if uneven and batches and self.accelerator.gradient_state.end_of_dataloader:
            mine = min(max(uneven - self.args.process_index * size, 0), size)
            batches[-1] = {**batches[-1], OWN: (mine, min(uneven, size))}
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> int:
        """As in one process, over all devices."""
        items = sum(self.items(batch, int(batch[OWN][0]) if OWN in batch else None) for batch in batch_samples)
        return int(self.accelerator.gather(torch.tensor([items], dtype=torch.float64, device=device)).sum())

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Of a micro-batch that was filled up by repeating, `own_loss`."""
        if OWN not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert num_items_in_batch is not None and not return_outputs
        own, most = inputs.pop(OWN)
        return self.own_loss(model, inputs, own, most, num_items_in_batch)


class _Sharded(PairTrainer):
    """The weights, their gradients and the optimizer's state are cut over the processes."""

    copies: int
    _empty: torch.nn.Module

    def whole_model(self) -> Any:
        """The trained model, in one piece; without its weights in processes that do not write. Collective."""
        if not hasattr(self, "_empty"):  # of a checkpoint of the last step: nothing was cut
            widen(self.model)
            return self.model
        return unsharded(self.model, self._empty, keep=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The checkpoint's weights in the place of the model's, mapped from its files; written into them they would be rounded to the numbers
        of the model's files (`load_to_cut`)."""
        for path in weight_files(Path(resume_from_checkpoint)):
            self.model.load_state_dict(load_file(path), strict=False, assign=True)
        self.model.tie_weights()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._empty = shard(self.model, mesh_over(self.args.device, self.copies))
        self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        state_dict = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = gathered_state(self.optimizer.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        read = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
        state = scattered_state(self.optimizer.optimizer, read(Path(checkpoint, OPTIMIZER_NAME)))
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(read(Path(checkpoint, SCHEDULER_NAME)))
