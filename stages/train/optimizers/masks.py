"""Which entries a merge keeps: at random (DARE) or by magnitude (TIES)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from schemas.ids import canonical_json
from stages.train.optimizers.shard import Shard
from stages.train.optimizers.top import keep_top_sharded_

BLOCK = 65_536
"""Entries of one random stream."""


def random_mask(
    reserve: float, key: tuple[int | str, ...], start: int, stop: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Entries `start` to `stop` of a tensor's mask, each True with probability `reserve`, as bool [stop - start].

    The stream is Philox (counter-based; numpy keeps its output stable over versions and machines): the counter is the
    global block of 65,536 entries, the Philox key a hash of `key`, for example (seed, step, parameter's name). So a mask does not
    depend on how a tensor is cut into shards, is the same after a resume, and needs no stored state.
    """
    mask = np.empty(stop - start, dtype=np.bool_)
    if reserve >= 1:
        mask.fill(True)
        return torch.from_numpy(mask).to(device)
    limit = np.uint32(min(round(reserve * 2**32), 2**32 - 1))
    digest = hashlib.blake2b(canonical_json(key).encode(), digest_size=16).digest()
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = max(start, block * BLOCK)
        last = min(stop, (block + 1) * BLOCK)
        draws = _draws(digest, block, last - block * BLOCK)[first - block * BLOCK :]
        np.less(draws, limit, out=mask[first - start : last - start])
    return torch.from_numpy(mask).to(device)


def _draws(digest: bytes, block: int, count: int) -> np.ndarray:
    """The first `count` uint32 of a block."""
    philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=[0, 0, block, 0])
    return np.asarray(philox.random_raw((count + 1) // 2)).astype("<u8", copy=False).view("<u4")[:count]


def keep_top_(values: torch.Tensor, reserve: float, released: bool = False, active: int | None = None) -> torch.Tensor:
    """Zero, in place, all but the k entries of largest magnitude; ties go to the lower position.

    k = max(1, round(reserve * n)); as released k = int(reserve * n), and k < 1 keeps everything. values: any shape. active: n, when only
    so many of the values may differ from 0; default: all.
    """
    count = values.numel()
    k = kept_of(count if active is None else active, reserve, released)
    if k >= count or k < 1:
        return values
    if values.device.type != "cpu":
        return _keep_top_on_device_(values, k)
    magnitude = values.abs().flatten()
    limit = _kth_smallest(magnitude, count - k)
    keep = magnitude >= limit
    surplus = int(keep.sum()) - k
    if surplus and limit > 0:
        ties = (magnitude == limit).nonzero().flatten()
        keep[ties[len(ties) - surplus :]] = False
    return values.mul_(keep.view(values.shape))


def _keep_top_on_device_(values: torch.Tensor, k: int) -> torch.Tensor:
    """The same without waiting for the device; torch.topk spreads a large tensor over all of it, kthvalue does not."""
    magnitude = values.abs().flatten()
    limit = magnitude.topk(k, sorted=False).values.min()
    above, equal = magnitude > limit, magnitude == limit
    room = k - above.sum(dtype=torch.int32)
    keep = above | (equal & (equal.cumsum(0, dtype=torch.int32) <= room))
    return values.mul_(keep.view(values.shape))


def keep_top_of_(
    values: list[torch.Tensor], shards: list[Shard], reserve: float, released: bool, active: list[int]
) -> None:
    """`keep_top_` of several parameters of which this process holds `shards`: k and ties are those of the whole parameters,
    `active` counts over the whole."""
    if shards[0].peers is None:
        for value, n in zip(values, active, strict=True):
            keep_top_(value, reserve, released, n)
        return
    kept = [kept_of(n, reserve, released) for n in active]
    some = [i for i, shard in enumerate(shards) if 0 < kept[i] < shard.numel]
    if some:
        keep_top_sharded_([values[i] for i in some], [kept[i] for i in some], shards[0].peers)


def kept_of(count: int, reserve: float, released: bool) -> int:
    """k: how many of `count` entries are kept."""
    return int(reserve * count) if released else max(1, round(reserve * count))


def _kth_smallest(magnitude: torch.Tensor, index: int) -> torch.Tensor:
    """The value at `index` in ascending order. numpy's selection is the faster one."""
    if magnitude.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(magnitude.numpy(), index))[index]
    return magnitude.kthvalue(index + 1).values
