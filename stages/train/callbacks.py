"""What happens between steps: progress, stopping, refusing a loss that is not a number."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError
from stages.contract import Context, Stopped
from stages.train.processes import any_of

_NEWS_SECONDS = 5.0


class StepCallback(TrainerCallback):
    """Report each step, and each micro-batch of long ones; stop with a checkpoint when asked; refuse a loss that is not finite.

    A stop in the middle of a step waits for its end if, by the seconds a micro-batch and a checkpoint took so far, that and the
    checkpoint fit half of `execution.grace_seconds`; else the checkpoint is of the step before: weights and moments are still its own,
    and random numbers are put back to where that one ended.

    rows: of an epoch. later: steps that follow after this training. stopped: the run was asked to stop; a checkpoint of its
    last whole step is on disk.
    """

    def __init__(self, ctx: Context, section: TrainerConfig, rows: int, later: int = 0) -> None:
        self.progress, self.stop = ctx.progress, ctx.stop
        self.section, self.rows, self.later = section, rows, later
        self.grace = ctx.config.execution.grace_seconds / 2
        self.stopped = False
        self._random: dict[str, Any] = {}
        self._micro_batches = 0
        self._step_began = self._told = time.monotonic()
        self._saving_since, self._save_seconds, self._saved = 0.0, 0.0, -1
        self._started = time.monotonic()
        self._first_epoch = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.total(state.max_steps - state.global_step + self.later, "step")
        self._first_epoch, self._started = state.epoch or 0.0, time.monotonic()
        self._saved = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches, self._step_began = 0, time.monotonic()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches += 1
        now = time.monotonic()
        if now - self._told >= _NEWS_SECONDS:
            self._told = now
            self.progress.advance(0, micro_batches=float(self._micro_batches))
        if self.stopped or not any_of(self.stop() and not self._in_time(args, now)):
            return
        self.stopped = control.should_training_stop = True
        if state.global_step and self._saved != state.global_step:
            set_random_state(self._random)
            control.should_save = True

    def _in_time(self, args: TrainingArguments, now: float) -> bool:
        """Whether the rest of the step and a checkpoint of it fit the grace."""
        left = args.gradient_accumulation_steps - self._micro_batches
        return left * (now - self._step_began) / self._micro_batches + self._save_seconds <= self.grace

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._random, self._saving_since = random_state(), time.monotonic()
        if any_of(self.stop()):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_seconds, self._saved = time.monotonic() - self._saving_since, state.global_step

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


def random_state() -> dict[str, Any]:
    """Of every generator that a training draws from, as `set_random_state` takes it."""
    found = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where they were."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def beats(ctx: Context, amount: int, unit: str) -> Callable[..., None]:
    """Announce `amount` units of work; the function returned says that one (or so many) is done, and raises Stopped when asked to stop:
    what training left is on disk, so that the next run begins here."""
    ctx.progress.total(amount, unit)

    def beat(done: int = 1) -> None:
        ctx.progress.advance(done)
        if ctx.stop():
            raise Stopped

    return beat
