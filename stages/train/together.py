"""What a trainer does otherwise as one of several processes: uneven batches, a model that is cut over them.

Overrides of transformers 5.19 and accelerate 1.15:
- `get_batch_samples`: the pairs accelerate repeats to make an epoch's last batches even weigh nothing.
- `_save_rng_state`: each process flushes its own.
- `_prepare_for_training`, `_load_from_checkpoint`, `_save`, `_save_optimizer_and_scheduler`: a model cut over several processes
  (`sharding.py`), by the way transformers has for a model that was cut before; each process writes its rows (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from schemas import files
from stages.train.checkpoints import STATE, WEIGHTS, holds_rows
from stages.train.rows import parted_state, weights_of, write_rows
from stages.train.sharding import mesh_over, shard, unsharded
from stages.train.trainer import PairTrainer
from stages.train.whole import read_whole

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

    def _save_rng_state(self, output_dir: str) -> None:
        """On a network file system only the process that wrote a file can flush it."""
        super()._save_rng_state(output_dir)
        files.fsync(Path(output_dir, f"rng_state_{self.args.process_index}.pth"))

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

    cut = True
    copies: int
    processing_class: Any
    _empty: torch.nn.Module | None = None

    def whole_model(self, dtype: torch.dtype) -> Any:
        """The trained model in `dtype`, its weights mapped from a file on the run's disk; without them in processes that do not write.
        Collective."""
        assert self._empty is not None
        file = files.temporary_beside(Path(self.args.output_dir, "whole")) if self.args.should_save else None
        return unsharded(self.model, self._empty, dtype, file)

    def _cut(self) -> None:
        if self._empty is None:
            self._empty = shard(self.model, mesh_over(self.args.device, self.copies))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Each process reads its rows. Whole weights take the place of the model's before it is cut, mapped from their files; written into
        the model's they would be rounded to the numbers of its files (`load_to_cut`)."""
        if holds_rows(Path(resume_from_checkpoint)):
            self._cut()
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        read_whole(self.model, Path(resume_from_checkpoint), assign=True)
        self._cut()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._cut()
        self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Rows, by all; what goes with them by the first. All that is collective comes first: there every process hears what failed in one."""
        assert output_dir is not None
        tensors, self._small_state = parted_state(self.optimizer.optimizer)
        write_rows(weights_of(self.model), Path(output_dir, WEIGHTS))
        write_rows(tensors, Path(output_dir, STATE))
        if self.args.should_save:
            self.model.config.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            torch.save(self._small_state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
