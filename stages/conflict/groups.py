"""Groups of pairs that leave every direction together, and how to hold them in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def merge_groups(*labels: Sequence[Hashable | None]) -> Tensor:
    """Group labels [N] int64 such that pairs sharing any label (answer text, translation group) share a group.

    Each argument is one kind of label, one entry per pair; None shares with nobody. Sharing is made transitive, so that
    the pairs left out for one member are those left out for all: a very common short answer can chain many groups
    together, so report the largest. Labels are numbered by first appearance. Raises ValueError for unequal lengths.
    """
    if not labels or len({len(kind) for kind in labels}) != 1:
        raise ValueError("merge_groups needs label sequences of one length")
    n = len(labels[0])
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for kind in labels:
        first: dict[Hashable, int] = {}
        for i, label in enumerate(kind):
            if label is None:
                continue
            a, b = root(first.setdefault(label, i)), root(i)
            parent[max(a, b)] = min(a, b)
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(root(i), len(numbers)) for i in range(n)], dtype=torch.int64)


def plan_passes(group_N: Sequence[int], capacity: int) -> list[dict[int, int]]:
    """Which groups of more than one member to gather in which pass over the stream: [{group: number of members}].

    Members have to be in memory together. A group is held from its first to its last row, so groups that lie
    together in the stream need one pass whatever their number; scattered ones are spread over as many passes as
    keep the rows held at once within `capacity`. A single group larger than that is gathered alone.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 row, got {capacity}")
    waiting = {group: n for group, n in Counter(group_N).items() if n > 1}
    passes: list[dict[int, int]] = []
    while waiting:
        chosen: dict[int, int] = {}
        left: dict[int, int] = {}
        skipped: set[int] = set()
        held = 0
        for group in group_N:
            if group not in waiting or group in skipped:
                continue
            if group not in left:
                if held and held + waiting[group] > capacity:
                    skipped.add(group)
                    continue
                left[group] = chosen[group] = waiting[group]
                held += waiting[group]
            left[group] -= 1
            if left[group] == 0:
                held -= chosen[group]
        passes.append(chosen)
        waiting = {group: n for group, n in waiting.items() if group not in chosen}
    return passes
