"""Parameters that are updated together: one flat buffer, so that every transform is a few large operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from stages.train.optimizers.shard import Shard, add_up, local

BUCKET = 1 << 22
"""Elements of a bucket: what a step needs beside weights and state is a few buffers of this size."""


@dataclass
class Bucket:
    """Some parameters of one group at the same step, on one device, of one dtype, sharded over the same processes.

    params: what of them this process holds.  shards: which rows that is.

    update: flat buffer [sum of sizes] in float32 (float64 for float64 weights): AdamW's step first, at the end what is
    added to the displacements.  states: the optimizer's state of each parameter.  step: AdamW's, counting from 1.
    """

    group: dict[str, Any]
    names: list[str]
    shards: list[Shard]
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
        """One entry of every parameter's state, what of it this process holds."""
        return [local(state[key]) for state in self.states]

    @property
    def peers(self) -> dist.ProcessGroup | None:
        """The processes that hold the rest of the parameters; None: there is no rest."""
        return self.shards[0].peers


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype of displacements and updates: float32, or float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrowest(weights: torch.Tensor, peers: dist.ProcessGroup | None) -> torch.Tensor:
    """A copy of the weights in the smallest of bfloat16, float16 and their own dtype that holds them exactly, on every
    process that holds a part. Models are published in bfloat16, so their float32 masters usually start out at half the size."""
    kinds = (torch.bfloat16, torch.float16)
    wrong = [not torch.equal(weights.detach().to(kind).to(weights.dtype), weights) for kind in kinds]
    for kind, inexact in zip(kinds, add_up(torch.tensor(wrong, device=weights.device).int(), peers), strict=True):
        if not inexact:
            return weights.detach().to(kind, copy=True)
    return weights.detach().clone()


def cut(shards: Sequence[Shard], params: Sequence[torch.Tensor], steps: Sequence[int]) -> Iterator[list[int]]:
    """Indices of each bucket: neighbours of equal device, dtype, step and processes, up to `BUCKET` elements (one tensor at
    least). The same in every process: counted is the most that any of them holds."""
    bucket: list[int] = []
    size = 0
    kind: Any = None
    for index, (shard, param, step) in enumerate(zip(shards, params, steps, strict=True)):
        mine = (param.device, param.dtype, step, shard.peers)
        if bucket and (mine != kind or size + shard.most > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(index)
        size += shard.most
        kind = mine
    if bucket:
        yield bucket
