"""The numbers of a step that change from one to the next, and masks made of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from stages.train.optimizers.masks import is_kept, is_top

Number = float | torch.Tensor
Whole = int | torch.Tensor
Of = Literal["step", "task"]


class Numbers(NamedTuple):
    """Floats when run eagerly; tensors [] when compiled, so that no new value compiles anew.

    step_size: -lr / bias correction of the first moment.  root: root of that of the second.  shrink, decay: 1 - lr * weight_decay and
    -lr * weight_decay.  a, rest: weight of the task vector, 1 - a.  limits and factors: of `Cut`s, and of rescaling, for this parameter.
    """

    step_size: Number
    root: Number
    eps: Number
    shrink: Number
    decay: Number
    a: Number
    rest: Number
    reserve: Number
    step_limit: Number = -1.0
    task_limit: Number = -1.0
    step_factor: Number = 1.0
    task_factor: Number = 1.0


class Places(NamedTuple):
    """Where some entries are, and what decides about them by place. first: index of the first, modulo 2^32.  words: two int32 of the step's
    key and two of the task vector's.  share: `share_of`.  rooms: of the step's and the task vector's cut, counted from the first."""

    first: Whole
    step_first: Whole
    step_second: Whole
    task_first: Whole
    task_second: Whole
    share: Whole
    step_room: Whole = -1
    task_room: Whole = -1


class Mask(NamedTuple):
    """F for one run of entries. local: int32, their indices counted from the first of them."""

    local: torch.Tensor
    places: Places
    numbers: Numbers

    def random(self, of: Of) -> torch.Tensor:
        """Bool, True with probability `reserve`."""
        p = self.places
        first, second = (p.step_first, p.step_second) if of == "step" else (p.task_first, p.task_second)
        return is_kept(self.local + p.first, first, second, p.share)

    def top(self, of: Of, values: torch.Tensor) -> torch.Tensor:
        """Bool, True for the largest magnitudes of the whole parameter."""
        n, p = self.numbers, self.places
        limit, room = (n.step_limit, p.step_room) if of == "step" else (n.task_limit, p.task_room)
        return is_top(values.abs(), self.local, limit, room)


def axpy(x: torch.Tensor, y: torch.Tensor, a: Number) -> torch.Tensor:
    """x + a y; with a float as torch's in-place add computes it, which rounds once."""
    return torch.add(x, y, alpha=a) if isinstance(a, float) else x + y * a
