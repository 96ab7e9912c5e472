"""Which parameters are updated together, and in which dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from stages.train.optimizers.shard import LocalRows, add_up

BUCKET = 1 << 22
"""Elements of a bucket: parameters whose task vector is read ahead together, and whose sums over processes go in one message."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype of moments, displacements and updates: float32, or float64 for float64 weights."""
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


def cut(shards: Sequence[LocalRows], params: Sequence[torch.Tensor], steps: Sequence[int]) -> Iterator[list[int]]:
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
