"""OnTIES: the largest entries, then an election of signs (arXiv 2405.17931, after TIES)."""

from __future__ import annotations

from typing import ClassVar

import torch

from stages.train.optimizers.rules.rule import Rule, Selection
from stages.train.optimizers.terms import Mask, Numbers, axpy


class OnTies(Rule):
    """paper: consensus of x = (1 - a) F(delta) and y = a F(tau), the paper's weighted election. Same sign: x + y. Opposite signs: the larger
    magnitude; equal opposite magnitudes cancel.

    released: the vote is sign(F(tau) + F(delta)), unweighted, 0 counting as +; then the weighted sum of what agrees with the vote. Since tau
    is orders of magnitude larger than a step, it wins nearly every vote it takes part in.
    """

    name: ClassVar[str] = "onties"
    selection: ClassVar[Selection] = "top"
    changes_at_zero: ClassVar[bool] = True

    def pull(self, task: torch.Tensor | None, displacement: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """F(tau), the same at every step."""
        assert task is not None
        if self.partial:
            task = task * mask.top("task", task)
        return task * n.task_factor if self.rescale else task

    def kept(self, delta: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """F(delta)."""
        return delta * mask.top("step", delta) if self.partial else delta

    def merged(self, delta: torch.Tensor, pull: torch.Tensor, n: Numbers) -> torch.Tensor:
        """The elected update."""
        if self.released:
            positive = (delta + pull) >= 0
            x = delta * ((delta > 0) == positive)
            y = pull * ((pull > 0) == positive)
            return axpy(x * n.rest, y, n.a)
        x, y = delta * n.rest, pull * n.a
        won = (x + y).sign()  # of the larger one: with it, x and y are what agrees (where they do not cancel)
        return ((x * won).clamp(min=0) + (y * won).clamp(min=0)) * won
