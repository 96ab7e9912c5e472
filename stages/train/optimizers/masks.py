"""Which entries a merge keeps: at random (DARE) or by magnitude (TIES).

A random mask is a hash of (key, index of the entry in its whole parameter), counter-based: the same bits on every device, eager and
compiled, however a parameter is cut, after every resume; nothing is stored. A mask by magnitude is two numbers, a `Cut`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from schemas.ids import canonical_json
from stages.train.optimizers.bucket import wide
from stages.train.optimizers.top import EVERYTHING, Cut, cut_whole

HALF = 1 << 31
SPAN = 1 << 32
"""Indices under one key; entries beyond have another (`words`)."""
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - SPAN
"""Multipliers of Wellons' lowbias32, as int32."""

Key = tuple[int | str, ...]


class Words(NamedTuple):
    """Two int32 that a key became."""

    first: int
    second: int


def key_words(key: Key, span: int = 0) -> Words:
    """The words of a key, for example (seed, phase, step, "task", name). span: the index divided by 2^32."""
    digest = hashlib.blake2b(canonical_json([*key, span]).encode(), digest_size=8).digest()
    first, second = (int.from_bytes(part, "little", signed=True) for part in (digest[:4], digest[4:]))
    return Words(first, second)


def share_of(reserve: float) -> int:
    """The bound that a share `reserve` of all uint32 is below, as an int32 of the same order."""
    return min(round(reserve * SPAN), SPAN - 1) - HALF


def is_kept(
    index: torch.Tensor, first: int | torch.Tensor, second: int | torch.Tensor, share: int | torch.Tensor
) -> torch.Tensor:
    """Bool, True with probability `share_of`. index: int32, the entries' indices modulo 2^32. first, second: `Words`.

    Two rounds of an integer hash with a word of the key before each; int32 throughout, which every backend has.
    """
    return (_mix(_mix(index ^ first) + second) ^ -HALF) < share


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def wrapped(index: int) -> int:
    """An index modulo 2^32, as an int32."""
    return (index + HALF) % SPAN - HALF


def random_mask(reserve: float, key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Entries `start` to `stop` of a tensor's mask, each True with probability `reserve`, as bool [stop - start]."""
    if reserve >= 1:
        return torch.ones(stop - start, dtype=torch.bool, device=device)
    parts = [torch.empty(0, dtype=torch.bool, device=device)]
    while start < stop:
        end = min(stop, (start // SPAN + 1) * SPAN)
        index = torch.arange(end - start, dtype=torch.int32, device=device) + wrapped(start)
        parts.append(is_kept(index, *key_words(key, start // SPAN), share_of(reserve)))
        start = end
    return torch.cat(parts)


def is_top(
    magnitude: torch.Tensor, local: torch.Tensor, limit: float | torch.Tensor, room: int | torch.Tensor
) -> torch.Tensor:
    """Bool, True for what a `Cut` keeps. local: int32, indices from some first entry on; room: the cut's last tie, counted from there."""
    return (magnitude > limit) | ((magnitude == limit) & (local <= room))


def room_of(last: int | torch.Tensor, first: int) -> int | torch.Tensor:
    """A cut's last tie, counted from entry `first`, within int32."""
    if isinstance(last, torch.Tensor):
        return (last - first).clamp(-1, HALF - 1).to(torch.int32)
    return min(max(last - first, -1), HALF - 1)


def kept_of(count: int, reserve: float, released: bool) -> int:
    """k: how many of `count` entries are kept; 0: all of them, as released when k < 1."""
    return int(reserve * count) if released else max(1, round(reserve * count))


def top_cut(values: torch.Tensor, k: int) -> Cut:
    """The cut that keeps the k entries of largest magnitude of a whole tensor on the CPU; k = 0 or all there are: everything."""
    if not 0 < k < values.numel():
        return EVERYTHING
    flat = values.detach().reshape(-1)

    def magnitudes() -> Iterator[torch.Tensor]:
        return (part.to(wide(part.dtype)).abs() for part in flat.split(1 << 20))

    return cut_whole(magnitudes(), k, flat.numel(), magnitudes)


def keep_top_(values: torch.Tensor, reserve: float, released: bool = False, active: int | None = None) -> torch.Tensor:
    """Zero, in place, all but the k entries of largest magnitude of a tensor on the CPU; ties go to the lower position.

    k = max(1, round(reserve * n)); as released k = int(reserve * n), and k < 1 keeps everything. values: any shape. active: n, when only
    so many of the values may differ from 0; default: all.
    """
    cut = top_cut(values, kept_of(values.numel() if active is None else active, reserve, released))
    local = torch.arange(values.numel(), dtype=torch.int32)
    assert isinstance(cut.last, int)
    return values.mul_(is_top(values.abs(), local.view(values.shape), cut.limit, room_of(cut.last, 0)))
