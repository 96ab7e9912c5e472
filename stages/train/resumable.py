"""What TRL's trainers share here: checkpoints that resume exactly, no pickled arguments, nothing sent anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from stages.train.checkpoints import mark_complete


class Resumable:
    """Mixin in front of a TRL trainer. identity: what the run depends on; only checkpoints with the same one are resumed from.

    - `train`: TRL's running token count, which its checkpoints lack, continues from the last log. From a checkpoint of the last step
      nothing is trained: transformers would take another step where `max_steps` ends inside an epoch.
    - `_save`, `_save_checkpoint`: no pickled training arguments; a checkpoint is marked complete last.
    - `create_model_card`, `_send_telemetry`: the stage writes its own card; a run reports to nobody unasked.
    """

    identity: str
    accelerator: Any
    args: Any
    state: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train or resume."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            self._total_train_tokens = counts[-1] if counts else 0
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)  # type: ignore[attr-defined]
                self.state = state
                return None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        Path(str(output_dir or self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # each process wrote the state of its random numbers
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            mark_complete(folder, self.identity, self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card inside checkpoints: the stage writes one for the final model."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""
