"""What happens between steps: progress, stopping, refusing a loss that is not a number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError
from stages.contract import Context, Stopped
from stages.train.processes import any_of


class StepCallback(TrainerCallback):
    """Report each step; stop with a checkpoint when asked; refuse a loss that is not finite.

    rows: of an epoch. later: steps that follow after this training. stopped: the run was asked to stop; a checkpoint of its
    last step is on disk.
    """

    def __init__(self, ctx: Context, section: TrainerConfig, rows: int, later: int = 0) -> None:
        self.progress, self.stop = ctx.progress, ctx.stop
        self.section, self.rows, self.later = section, rows, later
        self.stopped = False
        self._started = time.monotonic()
        self._first_epoch = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.total(state.max_steps - state.global_step + self.later, "step")
        self._first_epoch, self._started = state.epoch or 0.0, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any_of(self.stop()):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the training loss is {logs['loss']} at step {state.global_step}",
                where=self.section.section,
                fix=f"Lower {self.section.section}.learning_rate, or use model.dtype: bfloat16 or float32.",
            )
        rows = ((state.epoch or 0.0) - self._first_epoch) * self.rows
        rates = {f"{self.section.rows}_per_s": rows / max(time.monotonic() - self._started, 1e-9), "loss": logs["loss"]}
        if "rewards/accuracies" in logs:
            rates["accuracy"] = logs["rewards/accuracies"]
        self.progress.advance(1, **rates)


def beats(ctx: Context, amount: int, unit: str) -> Callable[[], None]:
    """Announce `amount` units of work; the function returned says that one is done, and raises Stopped when asked to stop:
    what training left is on disk, so that the next run begins here."""
    ctx.progress.total(amount, unit)

    def beat() -> None:
        ctx.progress.advance()
        if ctx.stop():
            raise Stopped

    return beat
