"""The k entries of largest magnitude of a parameter, exactly, as a `Cut`; ties go to the lower position.

Whole parameters on a CPU: one pass that counts what lies above a bracket and remembers what lies in it (`cut_whole`). On a GPU, or where the parts of a parameter lie on
several processes: radix selection (`cuts_by_digits`). The bits of a non-negative float, read as an integer, order as the float does; three
rounds (six in float64) over 11-bit digits from the top, each a histogram of the entries that are still in question, summed over the
processes, narrow the k-th largest value down to all its bits. Nothing is sorted or gathered, nothing waits for the device, and what is
kept beside a chunk of magnitudes is counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from stages.train.optimizers.shard import add_up, before_me

_DIGIT = 11
_BINS = 1 << _DIGIT
_BLOCK = 2048
"""Entries whose ties are counted together."""
_SAMPLE = 8192
_ROOM = 1 << 16
"""Entries that may be remembered beside three times those wanted."""
_INTEGERS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


class Cut(NamedTuple):
    """Kept are magnitudes above `limit`, and those equal to it up to position `last` of the whole parameter. Tensors [] on a GPU."""

    limit: float | torch.Tensor
    last: int | torch.Tensor


EVERYTHING = Cut(-1.0, -1)


Magnitudes = Callable[[], Iterable[torch.Tensor]]


def cut_whole(magnitudes: Iterable[torch.Tensor], k: int, size: int, again: Magnitudes) -> Cut:
    """Of the flat magnitudes of a whole parameter of `size` entries in parts, float32 or float64 on the CPU, k >= 1. All are looked at, once.

    A sample of the first part gives a bracket that most likely holds the k-th largest. Where it does not, `again`, which gives the
    magnitudes once more, is looked through without one.
    """
    bracket: tuple[float, float] | None = None
    values: list[np.ndarray] = []
    places: list[np.ndarray] = []
    first = above = held = 0
    for part in magnitudes:
        given = part.numpy()
        low, high = bracket = bracket or _bracket(given, k / size)
        if held <= 3 * k + _ROOM:
            found = _where((part >= low).numpy())  # torch compares on all cores
            value = given[found]
            inside = value <= high
            above += len(value) - int(np.count_nonzero(inside))
            values.append(value[inside])
            places.append(found[inside] + first)
            held += len(values[-1])
        first += len(given)
    left = k - above
    if not 1 <= left <= held <= 3 * k + _ROOM:
        return _cut_streamed(again(), k)
    value, place = np.concatenate(values), np.concatenate(places)
    limit = np.partition(value, held - left)[held - left]
    ties = place[value == limit]
    return Cut(float(limit), int(ties[left - int(np.count_nonzero(value > limit)) - 1]))


def _bracket(given: np.ndarray, share: float) -> tuple[float, float]:
    """Two values between which the smallest of the largest `share` of all entries lies, by a sample, in both directions by four standard
    deviations of its rank and more."""
    sample = np.sort(given[:: max(1, len(given) // _SAMPLE)])
    rank = share * len(sample)
    low, high = int(1.5 * rank + 16), int(0.6 * rank - 8)
    return (float(sample[-low]) if low <= len(sample) else 0.0), (float(sample[-high]) if high >= 1 else np.inf)


def _where(mask: np.ndarray) -> np.ndarray:
    """Positions of the few that are true: eight are passed over at once."""
    whole = len(mask) & ~7
    words = np.flatnonzero(mask[:whole].view(np.uint64))
    inner = np.flatnonzero(mask[:whole].reshape(-1, 8)[words])
    return np.concatenate([8 * words[inner >> 3] + (inner & 7), np.flatnonzero(mask[whole:]) + whole])


def _cut_streamed(magnitudes: Iterable[torch.Tensor], k: int) -> Cut:
    """The same, of any magnitudes, remembering at most about 1.5 k of them.

    The k-th largest so far never exceeds the k-th largest of all, so what is below it is passed over; of equal ones the first stay.
    """
    values: list[np.ndarray] = []
    places: list[np.ndarray] = []
    limit, first, held = 0.0, 0, 0
    for part in magnitudes:
        given = part.numpy()
        if not first:
            limit = _below(given, k)
        found = np.flatnonzero(given > limit if held >= k else given >= limit)
        values.append(given[found])
        places.append(found + first)
        first, held = first + len(given), held + len(found)
        if held > k + (k >> 1) + _BLOCK:
            value, place, limit = _best(np.concatenate(values), np.concatenate(places), k)
            values, places, held = [value], [place], k
    if held < k:  # NaN, which keeps itself
        return EVERYTHING
    value, place, limit = _best(np.concatenate(values), np.concatenate(places), k)
    return Cut(limit, int(place[value == limit][-1]))


def _below(given: np.ndarray, k: int) -> float:
    """A value that at least k entries reach, guessed from a sample; 0 where the guess is wrong. What reaches it is a little more than k."""
    sample = np.sort(given[:: max(1, len(given) // _SAMPLE)])
    rank = int(len(sample) * min(1.0, 1.25 * k / len(given)) + 16)
    if rank >= len(sample):
        return 0.0
    guess = sample[-rank]
    return float(guess) if np.count_nonzero(given >= guess) >= k else 0.0


def _best(values: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The k largest, in their order, the first of equal ones; and the smallest of them."""
    limit = np.partition(values, len(values) - k)[len(values) - k]
    keep = values > limit
    ties = np.flatnonzero(values == limit)
    keep[ties[: k - int(np.count_nonzero(keep))]] = True
    return values[keep], places[keep], float(limit)


@dataclass(frozen=True)
class Held:
    """What one process holds of a parameter. chunks: its magnitudes in flat parts whose lengths are multiples of 2,048 (but the last), the
    same at every call. at: magnitudes at these positions, counted from `first`, the position of the first entry held. k: how many of the
    whole parameter's entries to keep."""

    chunks: Callable[[], Iterator[torch.Tensor]]
    at: Callable[[torch.Tensor], torch.Tensor]
    first: int
    size: int
    k: int


def cuts_by_digits(
    held: list[Held], dtype: torch.dtype, device: torch.device, peers: dist.ProcessGroup | None
) -> list[Cut]:
    """A cut for each parameter; 1 <= k <= its entries. Collective: every process calls it with what it holds of the same ones."""
    integer, high = _INTEGERS[dtype]
    left = torch.tensor([h.k for h in held]).to(device, non_blocking=True)
    prefix = torch.zeros(len(held), dtype=torch.int64, device=device)
    top = True
    while high:
        width = min(_DIGIT, high)
        high -= width
        found = [_histogram(h.chunks(), integer, high, width, None if top else prefix[i]) for i, h in enumerate(held)]
        counts = add_up(torch.stack([f if f is not None else prefix.new_zeros(_BINS) for f in found]), peers)
        from_top = counts.flip(1).cumsum(1)
        steps = (from_top < left[:, None]).sum(1)  # digits above the one the k-th largest has
        above = torch.where(steps > 0, from_top.gather(1, (steps - 1).clamp(min=0)[:, None])[:, 0], 0)
        left = left - above
        prefix = (prefix << width) | (_BINS - 1 - steps)
        top = False
    blocks = [_ties(h.chunks(), integer, prefix[i]) for i, h in enumerate(held)]
    here = torch.stack([b.sum() if b is not None else prefix.new_zeros(()) for b in blocks])
    room = torch.minimum((left - before_me(here, peers)).clamp(min=0), here)
    lasts = [_last(h, b, room[i], prefix[i], integer) for i, (h, b) in enumerate(zip(held, blocks, strict=True))]
    limits = prefix.to(integer).view(dtype)
    return [Cut(limits[i], last) for i, last in enumerate(lasts)]


def _histogram(
    chunks: Iterator[torch.Tensor], integer: torch.dtype, high: int, width: int, prefix: torch.Tensor | None
) -> torch.Tensor | None:
    """Counts of the `width` bits above bit `high`, of the entries whose bits above those are `prefix`; None: there are no entries."""
    total = None
    for chunk in chunks:
        bits = chunk.view(integer)
        digit = (bits >> high) & ((1 << width) - 1)
        if prefix is not None:
            digit = torch.where((bits >> (high + width)) == prefix, digit, _BINS)
        counts = _count(digit)
        total = counts if total is None else total + counts
    return total


def _count(digit: torch.Tensor) -> torch.Tensor:
    """How often each of 0 to 2,047 occurs. bincount would wait for a GPU to say the largest; histc counts in float32, exact up to 2^24."""
    if digit.device.type == "cpu":
        return torch.bincount(digit, minlength=_BINS + 1)[:_BINS]
    parts = digit.to(torch.float32).split(1 << 24)
    return torch.stack([torch.histc(part, _BINS + 1, 0, _BINS + 1).long() for part in parts]).sum(0)[:_BINS]


def _ties(chunks: Iterator[torch.Tensor], integer: torch.dtype, limit: torch.Tensor) -> torch.Tensor | None:
    """Entries equal to the limit in each block of 2,048."""
    counts = []
    for chunk in chunks:
        equal = chunk.view(integer) == limit
        equal = torch.nn.functional.pad(equal, (0, -len(equal) % _BLOCK))
        counts.append(equal.view(-1, _BLOCK).sum(1))
    return torch.cat(counts) if counts else None


def _last(
    held: Held, blocks: torch.Tensor | None, room: torch.Tensor, limit: torch.Tensor, integer: torch.dtype
) -> torch.Tensor:
    """Position of the room-th entry that equals the limit; -1 where there is no room."""
    if blocks is None:
        return torch.full_like(room, -1)
    upto = blocks.cumsum(0)
    block = torch.searchsorted(upto, room.clamp(min=1)).clamp(max=len(upto) - 1)
    before = upto.gather(0, (block - 1).clamp(min=0).view(1))[0]  # an index of 0 dimensions would wait for the device
    inner = room - torch.where(block > 0, before, 0)
    places = block * _BLOCK + torch.arange(_BLOCK, device=room.device)
    equal = (held.at(places.clamp(max=held.size - 1)).view(integer) == limit) & (places < held.size)
    offset = (equal.cumsum(0) < inner).sum()
    return torch.where(room > 0, held.first + block * _BLOCK + offset, -1)
