"""OnDARE: random masks (arXiv 2405.17931, equation 6, after DARE)."""

from __future__ import annotations

from typing import ClassVar

import torch

from stages.train.optimizers.rules.rule import Rule, Selection
from stages.train.optimizers.terms import Mask, Numbers

CLAMP = 1.0
"""The released code clamps the task vector, and a rescaled step, to [-1, 1]."""


class OnDare(Rule):
    """(1 - a) F(delta) + a F(tau). paper: both masks are drawn at every step, nothing is scaled. released: both are scaled by 1/p; the
    task vector's mask is drawn once for the run, and the scaled vector clamped."""

    name: ClassVar[str] = "ondare"
    selection: ClassVar[Selection] = "random"

    def pull(self, task: torch.Tensor | None, displacement: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """F(tau)."""
        assert task is not None
        if self.partial:
            task = task * mask.random("task")
        return (task / n.reserve).clamp(-CLAMP, CLAMP) if self.released else task

    def kept(self, delta: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """F(delta)."""
        if not self.partial:
            return delta
        kept = delta * mask.random("step")
        return kept / n.reserve if self.released else kept

    def rescaled(self, kept: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
        """As released: clamped."""
        return (kept * factor).clamp(-CLAMP, CLAMP)

    def eps_of_norm(self, eps: float) -> float:
        """AdamW's."""
        return eps
