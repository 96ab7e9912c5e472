"""Summed |gradient| of the DPO loss at weights that do not move: one of the scores of entries. docs/methods.md section 7."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from stages.train.phase import Phase
from stages.train.session import Session
from stages.train.trainer import PairTrainer


class SummedGradients(torch.optim.Optimizer):
    """An optimizer that moves nothing: state["sum"] of a parameter is the sum of |gradient| over the steps, in float32."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Add this step's gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if "sum" not in state:
                        state["sum"] = torch.zeros_like(param, dtype=torch.float32)
                    state["sum"].add_(param.grad.abs())
        return loss


class GradientTrainer(PairTrainer):
    """Fills `sums` (parameter name -> sum of |gradient of a step|) and leaves the model as it is."""

    def __init__(self, *args: Any, sums: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self.sums = sums
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run, then hand the sums over."""
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.optimizer is None:  # the checkpoint was of the last step: nothing ran
            self.create_optimizer_and_scheduler(self.args.max_steps)
            self._load_optimizer_and_scheduler(str(resume_from_checkpoint))
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                state = optimizer.state.get(parameter, {})
                self.sums[name] = state["sum"] if "sum" in state else torch.zeros_like(parameter, dtype=torch.float32)
        return result

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """`SummedGradients`."""
        if self.optimizer is None:
            wrapped: Any = self.model if model is None else model
            self.optimizer = SummedGradients([p for p in wrapped.parameters() if p.requires_grad], {"lr": 0.0})
        return self.optimizer


@dataclass(frozen=True)
class GradientPhase(Phase):
    """sums: filled, see `GradientTrainer`."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    kind: type[PairTrainer] = GradientTrainer

    def options(self, session: Session, model: PreTrainedModel) -> dict[str, Any]:
        """Where the sums go."""
        return {"sums": self.sums}
