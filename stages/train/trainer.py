"""TRL's DPOTrainer, given our token ids, our reference log-probabilities and our optimizer.

Overrides of TRL 1.16 (pinned; tests/stages/train check that the methods are still there):
- `_prepare_dataset`, `_precompute_ref_logps`: rows arrive tokenised, with reference log-probabilities, and are used as
  they are: nothing is tokenised again, truncated or dropped.
- `_get_num_items_in_batch`, `compute_loss`: every pair of a step weighs the same, so that the micro-batch size does not
  change the result, not even in the last, smaller batch of an epoch.
- `create_optimizer`: `build_optimizer`, also under FSDP; `log`: what the merge did.
- `_set_signature_columns_if_needed`, the collator: `key_tokens`, where rows have them, restrict the rejected side (train/allo).
- `_save`, `_save_checkpoint`: no pickled training arguments; a checkpoint is marked complete last.
- `create_model_card`, `_send_telemetry`: the stage writes its own card; a run reports to nobody unasked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from schemas.config.training import TrainConfig
from stages.train.allo.collators import KeyTokens
from stages.train.checkpoints import mark_complete
from stages.train.loss import LengthPenalisedDPOTrainer
from stages.train.optimizers import ActiveEntries, OnlineMergingAdamW, TaskVector
from stages.train.optimizers.build import build_optimizer
from stages.train.optimizers.confine import MASKED
from stages.train.optimizers.subspace import Protected

ROW_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
TOKEN_COLUMNS = ("key_tokens", "token_weights", "ref_token_logps")


class PairTrainer(LengthPenalisedDPOTrainer):
    """DPOTrainer on rows of token ids and reference log-probabilities (`ROW_COLUMNS`).

    identity: what the run depends on; only checkpoints with the same identity are resumed from.
    task_vector: what `train.optimizer` merges with. protected: subspaces no update enters. active: entries that are trained.
    """

    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]

    def __init__(
        self,
        *args: Any,
        train_config: TrainConfig,
        identity: str,
        task_vector: TaskVector | None = None,
        protected: Protected | None = None,
        active: ActiveEntries | None = None,
        **kwargs: Any,
    ) -> None:
        self.train_config = train_config
        self.identity = identity
        self.task_vector = task_vector
        self.protected = protected
        self.active = ActiveEntries({}) if active is None else active
        super().__init__(*args, **kwargs)
        self.data_collator = self.collator(self.data_collator)

    def collator(self, whole: Any) -> Any:
        """What makes batches of rows; whole: TRL's, of whole pairs."""
        return KeyTokens(whole)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train or resume; TRL's running token count, which its checkpoints lack, continues from the last log. From a checkpoint of
        the last step nothing is trained: transformers would take another step where `max_steps` ends inside an epoch."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            self._total_train_tokens = counts[-1] if counts else 0
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return None
        model: Any = self.model
        with self.active.on_gradients(model.named_parameters()):  # before gradients are clipped
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, *TOKEN_COLUMNS]))

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        missing = [name for name in ROW_COLUMNS if name not in dataset.column_names]
        if missing:
            raise ValueError(f"training rows lack {', '.join(missing)}")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> int:
        """Pairs in this optimizer step, over all devices."""
        pairs = sum(batch["input_ids"].shape[0] // 2 for batch in batch_samples)
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
        """TRL's mean over the micro-batch, rescaled so that micro-batches sum to the mean over the step's pairs."""
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
        super()._save(output_dir, state_dict)
        Path(str(output_dir or self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            mark_complete(folder, self.identity, self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card inside checkpoints: the stage writes one for the final model."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""
