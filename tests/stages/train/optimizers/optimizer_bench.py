"""Small named parameters with random gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stages.train.optimizers import Merge, OnlineMergingAdamW, TaskVector
from stages.train.optimizers.rules import Rule
from stages.train.optimizers.terms import Numbers

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (40, 24),
    "layer.weight": (24, 24),
    "layer.bias": (24,),
    "norm": (24,),
    "scale": (),
}


class Bench:
    """Weights, gradients and a task vector from a seed; optimizers over copies of the same weights."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.start = {name: self.normal(name).to(dtype) for name in SHAPES}
        self.tau = {name: 0.02 * self.normal(name) for name in SHAPES}
        self.vector = TaskVector.from_tensors(self.tau)

    def normal(self, name: str) -> torch.Tensor:
        return torch.randn(SHAPES[name], generator=self.random)

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(value.clone()) for name, value in self.start.items()}

    def gradients(self, steps: int) -> list[dict[str, torch.Tensor]]:
        return [{n: self.normal(n).to(self.start[n].dtype) for n in SHAPES} for _ in range(steps)]

    def merged(
        self, weights: dict[str, nn.Parameter], merge: Merge, vector: TaskVector | None = None, **arguments: Any
    ) -> OnlineMergingAdamW:
        return OnlineMergingAdamW(
            list(weights.items()), merge=merge, task_vector=vector or self.vector, **{"lr": 1e-2, **arguments}
        )


def run(
    optimizer: torch.optim.Optimizer,
    weights: dict[str, nn.Parameter],
    gradients: list[dict[str, torch.Tensor]],
    schedule: Any = None,
) -> None:
    """One step per entry of `gradients`."""
    for gradient in gradients:
        for name, value in gradient.items():
            weights[name].grad = value.clone()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def merged(rule: Rule, delta: torch.Tensor, pull: torch.Tensor, a: float) -> torch.Tensor:
    """A rule's update of a step and what it is merged with, both masked already."""
    return rule.merged(delta, pull, Numbers(-1.0, 1.0, 0.0, 1.0, 0.0, a, 1 - a, 1.0))
