"""Training whose updates are merged with a task vector, kept out of subspaces, or kept to some entries of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from schemas.config.training import TrainConfig
from schemas.errors import UserError
from stages.train.optimizers import ActiveEntries, OnlineMergingAdamW, TaskVector
from stages.train.optimizers.build import build_optimizer
from stages.train.optimizers.confine import MASKED
from stages.train.optimizers.subspace import Protected
from stages.train.phase import Phase
from stages.train.session import Session
from stages.train.trainer import PairTrainer
from stages.train.vector import task_vector_for

_WORTH_SAYING = 1.0
"""Seconds."""


class ConfinedTrainer(PairTrainer):
    """A PairTrainer with the optimizer of `optimizers/build.py`.

    task_vector: what `train.optimizer` merges with. protected: subspaces no update enters. active: entries that are trained.
    tell: one line for people.
    """

    def __init__(
        self,
        *args: Any,
        train_config: TrainConfig,
        task_vector: TaskVector | None,
        protected: Protected,
        active: ActiveEntries,
        tell: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        self.train_config, self.task_vector, self.active = train_config, task_vector, active
        self._tell, self._stepped = tell, False
        super().__init__(*args, **kwargs)
        self.protected = protect_adapter(self.model, protected) if isinstance(self.model, PeftModel) else protected

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train or resume, only the active entries."""
        with self.active.on_gradients(self.model.named_parameters()):  # before gradients are clipped
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Over the model as it is wrapped now: FSDP hands over its sharded parameters."""
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
            if not self._stepped:
                self._stepped = True
                self._after_first(optimizer)
            found = sorted(optimizer.telemetry.items())
            logs = logs | {f"{'mask' if name in MASKED else 'merge'}/{name}": value for name, value in found}
        super().log(logs, start_time)

    def _after_first(self, optimizer: Any) -> None:
        """After the first step, in which all of it is compiled, and what mask and subspaces leave together is found. Raises UserError where that
        is nothing."""
        if (seconds := optimizer.compile_seconds) >= _WORTH_SAYING:
            self._tell(
                f"the optimizer's step was compiled in {seconds:.0f} s; torch keeps it for later runs on this machine"
            )
        if not (frozen := optimizer.frozen_columns):
            return
        what = f"{frozen:.1%} of the columns (rows with side: right) with trained weights have no direction that is not protected, and cannot move"
        if frozen == 1:
            raise UserError(
                f"{what}: no matrix is trained",
                where="train.allo, train.orthalign",
                fix="Lower train.orthalign.q_max, or raise train.allo.forget_ratio or learn_ratio.",
            )
        self._tell(what)


@dataclass(frozen=True)
class ConfinedPhase(Phase):
    """protected: subspaces no update enters. active: entries that are trained. Merged as `train.optimizer` says."""

    protected: Protected = field(default_factory=Protected.none)
    active: ActiveEntries = field(default_factory=lambda: ActiveEntries({}))
    kind: type[PairTrainer] = ConfinedTrainer

    def options(self, session: Session, model: PreTrainedModel) -> dict[str, Any]:
        """What confines the updates."""
        return {
            "train_config": session.train,
            "task_vector": task_vector_for(session.ctx, model),
            "protected": self.protected,
            "active": self.active,
            "tell": session.ctx.progress.note,
        }


def protect_adapter(model: PeftModel, protected: Protected) -> Protected:
    """The bases of matrices as bases of a fresh adapter's factors: left ones of B [O, r], right ones of A [r, I].

    B starts at 0; A is projected here. With every update projected as well, no output of B A lies in a left basis and no input it
    reads in a right one, exactly, whatever the optimizer.
    """
    left, right = {}, {}
    for name, parameter in model.named_parameters():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.[^.]+\.weight", name)
        weight = f"{match[1]}.weight" if match else ""
        if match and match[2] == "B" and weight in protected.left:
            left[name] = protected.left[weight]
        if match and match[2] == "A" and weight in protected.right:
            right[name] = protected.right[weight]
            Protected({}, {name: right[name]}).project_(name, parameter.data)
    return Protected(left, right)
