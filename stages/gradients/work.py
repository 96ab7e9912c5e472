"""How far a shard is: its pairs, by what the passes over them cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stages.gradients.rows import BatchRow, Pair

_SKETCH = 3
"""Passes of a token in a sketch, counted in forward passes: forward, backward through activations, projections."""


@dataclass
class Work:
    """Several passes go over the pairs of a shard, so that none is done before the last of them, and each says what it did all the same.

    pairs: of the shard. cost: of all passes over them, as `sketch_cost` and `forward_cost` count.
    """

    pairs: int
    cost: int
    _done: int = field(default=0, init=False)
    _told: int = field(default=0, init=False)

    def did(self, cost: int) -> int:
        """So much of the cost is done; returns how many pairs more that makes. What was not foreseen makes none."""
        self._done = min(self._done + cost, self.cost)
        return self._tell(self.pairs * self._done // self.cost if self.cost else 0)

    def finish(self) -> int:
        """The shard is done; returns the pairs that were not told yet: dropped ones, and what passes left out."""
        return self._tell(self.pairs)

    def _tell(self, pairs: int) -> int:
        more = pairs - self._told
        self._told = pairs
        return more


def sketch_cost(pair: Pair, shared: bool) -> int:
    """Of the sketch of a pair, in tokens of a forward pass. shared: its prompt is computed once."""
    return _SKETCH * (pair.joined if shared else pair_tokens(pair))


def forward_cost(rows: Sequence[BatchRow]) -> int:
    """Of a forward pass over rows."""
    return sum(map(len, rows))


def pair_tokens(pair: Pair) -> int:
    """Tokens of both rows."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
