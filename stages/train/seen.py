"""Which rows a training saw: all of them, unless it ended inside its first pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import RandomSampler

from stages.train.batches import BatchPlan


def rows_seen(rows: int, plan: BatchPlan, batch_size: int, seed: int) -> list[int]:
    """Positions of the rows, of so many, that a training of this plan learns from; seed: of its data (accelerate's
    SeedableRandomSampler, which tests/stages/train/test_train_seen.py holds this against)."""
    drawn = plan.steps * batch_size
    if drawn >= rows:
        return list(range(rows))
    sampler = RandomSampler(range(rows), generator=torch.Generator().manual_seed(seed))
    return list(islice(sampler, drawn))


@dataclass(frozen=True)
class Seen:
    """per_language: rows that were learnt from; given: rows there were."""

    per_language: dict[str, int]
    given: int

    @classmethod
    def of(cls, languages: Sequence[str], positions: Iterable[int]) -> Seen:
        """languages: of every row there was; positions: of those learnt from."""
        return cls(dict(Counter(languages[position] for position in positions)), len(languages))

    @property
    def count(self) -> int:
        """Rows that were learnt from."""
        return sum(self.per_language.values())
