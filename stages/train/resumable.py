"""What TRL's trainers share here: checkpoints that resume exactly, no pickled arguments, nothing sent anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from schemas.errors import UserError
from stages.contract import Stopped
from stages.train.adamw import adamw
from stages.train.callbacks import StepCallback
from stages.train.checkpoints import WEIGHTS, clear, holds_rows, mark_complete, resumable
from stages.train.disk import writing
from stages.train.processes import any_of, error_of_any, from_first
from stages.train.session import Session
from stages.train.whole import read_whole, write_whole


class Resumable:
    """Mixin in front of a TRL trainer. identity: what the run depends on; only checkpoints with the same one are resumed from.

    - `train`: TRL's running token count, which its checkpoints lack, continues from the last log. From a checkpoint of the last step
      nothing is trained: transformers would take another step where `max_steps` ends inside an epoch.
    - `_save`, `_save_checkpoint`: no pickled training arguments, weights under the model's own names (`whole.py`); a checkpoint is marked
      complete last, and removed when the disk fails.
    - `_load_from_checkpoint`, `_load_optimizer_and_scheduler`: every weight or an error; also of weights that were cut over processes, in
      any number of processes.
    - `create_optimizer`: plain AdamW.
    - `create_model_card`, `_send_telemetry`: the stage writes its own card; a run reports to nobody unasked.
    """

    cut = False
    """The weights are cut over processes."""
    accelerator: Any
    args: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    processing_class: Any
    state: Any

    def __init__(self, *args: Any, identity: str, **kwargs: Any) -> None:
        self.identity = identity
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train or resume."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            self._total_train_tokens = counts[-1] if counts else 0
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        if isinstance(self.model, PreTrainedModel):
            write_whole(self.model, folder)
            self.processing_class.save_pretrained(folder)
            return
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            with writing(folder, error_of_any):  # each process wrote the state of its random numbers
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.args.should_save:
                mark_complete(folder, self.identity, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if holds_rows(folder):
            from stages.train.rows import read_rows, weights_of

            read_rows(weights_of(self.model), folder / WEIGHTS)
        elif isinstance(self.model, PreTrainedModel):
            read_whole(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.cut or holds_rows(Path(checkpoint))):
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        from stages.train.rows import read_state

        self.optimizer.load_state_dict(read_state(self.optimizer.optimizer, Path(checkpoint), OPTIMIZER_NAME))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Over the model as it is wrapped now."""
        if self.optimizer is None:
            wrapped = self.model if model is None else model
            self.optimizer = adamw(wrapped, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card inside checkpoints: the stage writes one for the final model."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def train_all(session: Session, trainer: Any, steps: StepCallback, rows: int) -> None:
    """Train a `Resumable` from its last checkpoint, if there is one, on all of its rows.

    Raises UserError if TRL lost a row, Stopped when asked to stop; a checkpoint of the last step is then on disk.
    """
    trainer.remove_callback(PrinterCallback)
    kept = trainer.num_examples(trainer.get_train_dataloader())
    if kept != rows:
        raise UserError(
            f"TRL kept {kept} of {rows} {steps.section.rows}",
            where=steps.section.section,
            fix="This is a change in TRL: use the pinned version.",
        )
    checkpoints = Path(trainer.args.output_dir)

    def latest() -> Path | None:
        clear(checkpoints)
        return resumable(checkpoints, trainer.identity, session.note)

    checkpoint = from_first(latest, session.config)
    if checkpoint is not None:
        session.note(f"resuming from {checkpoint.name}")
    if any_of(session.ctx.stop()):
        raise Stopped
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if steps.stopped:
        raise Stopped
