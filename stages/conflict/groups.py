"""Groups of pairs that leave every direction together, and how to lay their members side by side."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

_COMMON_ANSWER = (20, 0.01)
"""An answer shared by more pairs than both (a number, a share of all) does not join them into one group: "Yes." would
chain unrelated tasks together."""


@dataclass(frozen=True)
class Groups:
    """Which of N pairs leave every direction together.

    label_N: equal labels leave together; None: each pair leaves alone. common: pairs one of whose answers is too common to join pairs; cut:
    pairs one of whose answers does not join them because all it joins would leave nothing to compare them with. Such answers stay in the
    directions that their pairs are compared with.
    """

    n: int
    label_N: Tensor | None
    common: int = 0
    cut: int = 0

    @property
    def shared(self) -> int:
        """Pairs that leave with others."""
        return 0 if self.label_N is None else int((torch.bincount(self.label_N)[self.label_N] > 1).sum())

    @property
    def largest(self) -> int:
        """Pairs in the largest group; 0 where all leave alone."""
        return 0 if self.label_N is None else int(torch.bincount(self.label_N).max())

    def notes(self) -> list[str]:
        """What people should know about them."""
        notes = []
        if self.largest > max(1, 0.2 * self.n):
            notes.append(
                f"{self.largest} of {self.n} pairs hang together by translations and shared answers and leave together"
            )
        if self.common:
            notes.append(
                f"{self.common} of {self.n} pairs have an answer so common that it does not leave the directions with them"
            )
        if self.cut:
            notes.append(
                f"{self.cut} of {self.n} pairs share an answer with so many others that, if all left together, nothing would be left to "
                "compare them with: the answer stays in the directions (conflict.leave_out)"
            )
        return notes


def leaving_together(pairs: pl.DataFrame, leave_out: Literal["pair", "answers", "group"]) -> Groups:
    """The pairs that leave every direction together.

    pairs: language, chosen, rejected (texts, or any id of them) and group_id. answers: pairs that share an answer, whichever side
    it is on; group: or a translation group. Answers that would join more than half of all pairs, or leave a pair no other language,
    are given up, the most shared ones first; translation groups are not.
    """
    if leave_out == "pair":
        return Groups(pairs.height, None)
    n, answers = pairs.height, _joining_answers(pairs)
    common = int((answers.reshape(2, -1) < 0).any(axis=0).sum())
    fixed = [np.tile(np.arange(n), 2)]
    if leave_out == "group":
        fixed.append(np.tile(pairs["group_id"].rank("dense").to_numpy().astype(np.int64), 2))
    language = pairs["language"].rank("dense").to_numpy().astype(np.int64) - 1
    cut = np.zeros(n, bool)
    while True:
        label = merge_groups(*fixed, answers)[:n]
        joined = np.tile(_leaves_too_little(label.numpy(), language), 2) & (answers >= 0)
        counts = np.bincount(answers[joined], minlength=len(answers))
        if counts.max() < 2:
            return Groups(n, label, common, int(cut.sum()))
        given_up = joined & (counts[answers] > counts.max() // 2)
        cut |= given_up.reshape(2, -1).any(axis=0)
        answers[given_up] = -1


def _leaves_too_little(label: np.ndarray, language: np.ndarray) -> np.ndarray:
    """Of each pair whether its group holds more than half of all pairs, or for one of its pairs every pair of the other languages."""
    size = np.bincount(label)[label]
    of_language = np.bincount(language)[language]
    mine = np.unique(np.stack([label, language]), axis=1, return_inverse=True, return_counts=True)
    own = mine[2][mine[1].reshape(-1)]
    others = len(label) - of_language
    too_little = (2 * size > len(label)) | ((others > 0) & (size - own == others))
    return np.bincount(label, weights=too_little)[label] > 0


def _joining_answers(pairs: pl.DataFrame) -> np.ndarray:
    """A number for the text of every chosen, then every rejected answer [2N]; -1 for those too common."""
    limit = max(_COMMON_ANSWER[0], int(_COMMON_ANSWER[1] * pairs.height))
    texts = np.concatenate([pairs["chosen"].to_numpy(), pairs["rejected"].to_numpy()])
    _, answers, counts = np.unique(texts, return_inverse=True, return_counts=True)
    return np.where(counts[answers] > limit, -1, answers)


def merge_groups(*labels: Sequence[Hashable | None] | np.ndarray) -> Tensor:
    """Group labels [N] int64 such that pairs sharing any label (answer text, translation group) share a group.

    Each argument is one kind of label, one entry per pair: any values, None shares with nobody; or an integer array,
    where -1 shares with nobody. Sharing is made transitive, so that the pairs left out for one member are those left
    out for all: a very common short answer can chain many groups together, so report the largest. Labels are numbered
    by first appearance. Raises ValueError for unequal lengths.
    """
    if not labels or len({len(kind) for kind in labels}) != 1:
        raise ValueError("merge_groups needs label sequences of one length")
    own = np.arange(len(labels[0]))
    kinds = [_codes(kind) for kind in labels]
    root = own.copy()
    while True:
        before = root
        for at, code, n_codes in kinds:
            lowest = np.full(n_codes, len(own))
            np.minimum.at(lowest, code, root[at])
            root = root.copy()
            # what a pair pointed to now points to the lowest of all that share the label
            np.minimum.at(root, root[at], lowest[code])
            root[at] = np.minimum(root[at], lowest[code])
        root = root[root]
        if np.array_equal(root, before):
            return torch.from_numpy(np.unique(root, return_inverse=True)[1].astype(np.int64))


def _codes(kind: Sequence[Hashable | None] | np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(pairs that have a label, its number, how many numbers)."""
    if not isinstance(kind, np.ndarray):
        seen: dict[Hashable, int] = {}
        kind = np.array([-1 if label is None else seen.setdefault(label, len(seen)) for label in kind], dtype=np.int64)
    (at,) = (kind >= 0).nonzero()
    values, code = np.unique(kind[at], return_inverse=True)
    return at, code, len(values)


@dataclass(frozen=True)
class Slots:
    """Where pairs that leave together are laid side by side: groups of equal size follow each other.

    slot_N: the place of each pair [N], -1 for a pair that has none; order: the pair at each slot; together: slots there are.
    """

    slot_N: Tensor
    order: Tensor
    size: Tensor

    @classmethod
    def of(cls, group_N: Tensor, alone: bool = False) -> Slots:
        """From group labels [N]. alone: pairs that leave alone get a place too."""
        _, inverse_N, count = torch.unique(group_N, return_inverse=True, return_counts=True)
        size_N = count[inverse_N]
        (several,) = (size_N > (0 if alone else 1)).nonzero(as_tuple=True)
        several = several[inverse_N[several].argsort(stable=True)]
        order = several[size_N[several].argsort(stable=True)]
        slot_N = torch.full_like(group_N, -1)
        slot_N[order] = torch.arange(len(order))
        return cls(slot_N, order, size_N[order])

    @property
    def together(self) -> int:
        return len(self.order)

    def batches(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first slot, pairs [g, m]): whole groups of m, about `rows` pairs at once and at least one group."""
        sizes, counts = torch.unique_consecutive(self.size, return_counts=True)
        start = 0
        for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            step = max(1, rows // size) * size
            for at in range(start, start + count, step):
                stop = min(at + step, start + count)
                yield at, self.order[at:stop].view(-1, size)
            start += count
