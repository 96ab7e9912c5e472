"""What a merge rule is: one class, in a file of its own, listed in `rules/__init__.py` and in `train.optimizer`'s values.

delta: AdamW's step, -(lr / bias correction) * m / (sqrt(v) + eps), without weight decay (over step-K's window their sum).  tau =
theta_SFT - theta_base.  a: weight of the task vector.  F keeps a share p of the entries. Where the released code
(QwenLM/online_merging_optimizers, commit 8e53529) differs from the paper, a rule has both forms.

The methods are pure functions of flat float tensors, run eagerly or inside one compiled step (`step.py`): tensor operations alone, numbers
from `Numbers`, which are floats when run eagerly and tensors of 0 dimensions when compiled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from stages.train.optimizers.terms import Mask, Numbers, axpy

Selection = Literal["none", "random", "top"]


@dataclass(frozen=True)
class Rule(ABC):
    """One merge, with what of its settings decides which operations it is made of.

    partial: it keeps less than all entries.  released: in the form of the released code, not the paper's.  rescale: scale what was kept
    of a step back to its L1 norm before the mask.
    """

    partial: bool = False
    released: bool = False
    rescale: bool = False

    name: ClassVar[str]
    selection: ClassVar[Selection] = "none"
    """How F selects. none: nothing is dropped, `reserve` and the released form do not exist."""
    anchored: ClassVar[bool] = False
    """Whether it pulls to a place, measured from where training starts (by default that place): see `MergeFacts`."""
    changes_at_zero: ClassVar[bool] = False
    """Whether the released form changes AdamW's step even with alpha = 0 and reserve = 1."""

    @abstractmethod
    def pull(self, task: torch.Tensor | None, displacement: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """What the step is merged with, before it is weighted. task: the task vector, 0 off the active entries. displacement: of
        the weights from their start."""

    def kept(self, delta: torch.Tensor, mask: Mask, n: Numbers) -> torch.Tensor:
        """F(delta), before any rescaling."""
        return delta

    def rescaled(self, kept: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
        """F(delta) with its L1 norm restored by `factor`."""
        return kept * factor

    def eps_of_norm(self, eps: float) -> float:
        """What is added to the L1 norm that a step is rescaled from."""
        return 0.0

    def merged(self, delta: torch.Tensor, pull: torch.Tensor, n: Numbers) -> torch.Tensor:
        """The update: (1 - a) F(delta) + a F(tau)."""
        return axpy(delta * n.rest, pull, n.a)
