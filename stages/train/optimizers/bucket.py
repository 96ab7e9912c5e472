"""Parameters that are updated together: one flat buffer, so that every transform is a few large operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

BUCKET = 1 << 25
"""Elements of a bucket: what a step needs beside weights and state is a few buffers of this size."""


@dataclass
class Bucket:
    """Some parameters of one group at the same step, on one device, of one dtype.

    update: flat buffer [sum of sizes] in float32 (float64 for float64 weights): AdamW's step first, at the end what is
    added to the displacements.  states: the optimizer's state of each parameter.  step: AdamW's, counting from 1.
    """

    group: dict[str, Any]
    names: list[str]
    params: list[torch.Tensor]
    states: list[dict[str, Any]]
    step: int
    update: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = sum(p.numel() for p in self.params)
        self.update = torch.zeros(size, dtype=wide(self.params[0].dtype), device=self.params[0].device)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` cut into the parameters' shapes; writes go through."""
        parts = flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def gather(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A flat copy of tensors that have the parameters' shapes."""
        flat = torch.empty_like(self.update)
        torch._foreach_copy_(self.views(flat), list(tensors))
        return flat

    def state(self, key: str) -> list[torch.Tensor]:
        """One entry of every parameter's state."""
        return [state[key] for state in self.states]


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype of displacements and updates: float32, or float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrowest(weights: torch.Tensor) -> torch.Tensor:
    """A copy of the weights in the smallest of bfloat16, float16 and their own dtype that holds them exactly. Models are
    published in bfloat16, so their float32 masters usually start out at half the size."""
    for dtype in (torch.bfloat16, torch.float16):
        small = weights.detach().to(dtype)
        if torch.equal(small.to(weights.dtype), weights):
            return small.clone()
    return weights.detach().clone()


def cut(names: Sequence[str], params: Sequence[torch.Tensor], steps: Sequence[int]) -> Iterator[list[int]]:
    """Indices of each bucket: neighbours of equal device, dtype and step, up to `BUCKET` elements (one tensor at least)."""
    bucket: list[int] = []
    size = 0
    kind: Any = None
    for index, (param, step) in enumerate(zip(params, steps, strict=True)):
        mine = (param.device, param.dtype, step)
        if bucket and (mine != kind or size + param.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(index)
        size += param.numel()
        kind = mine
    if bucket:
        yield bucket
