"""Anchor: a dense pull to the SFT weights. Ours."""

from __future__ import annotations

from typing import ClassVar

import torch

from stages.train.optimizers.rules.rule import Rule
from stages.train.optimizers.terms import Mask, Numbers


class Anchor(Rule):
    """(1 - a) delta + a (theta_SFT - theta): exactly the merge (1 - a)(theta + delta) + a theta_SFT. Without a task vector the anchor is
    where training started."""

    name: ClassVar[str] = "anchor"
    anchored: ClassVar[bool] = True

    def pull(self, task: torch.Tensor | None, displacement: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """theta_SFT - theta."""
        return -displacement if task is None else task - displacement
