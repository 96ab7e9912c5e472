"""A part's pairs on their way through the stage: one list, which only gets shorter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.contract import Drop
from stages.gradients.pair_sketches import PairSketches
from stages.gradients.rows import Pair
from stages.text.render import PairIds

Values = tuple[float, float]
"""Of chosen and of rejected."""
UNKNOWN: Values = (math.nan, math.nan)


@dataclass(slots=True)
class Item:
    """A row of the pairs table and its token ids.

    given, at: its place among the pairs given to the last pass and among that pass's results (fewer: what did not fit has
    none). reference: log-probabilities of both sides under the reference model. relevance, null: of both sides under the prompt and under another
    one (`stages.gradients.relevance`). relevant: the gate of `sketch.method: one_sided`, which comes before the sums, lets it in.
    """

    row: dict[str, Any]
    ids: PairIds
    given: int = -1
    at: int = -1
    reference: Values = UNKNOWN
    relevance: Values = UNKNOWN
    null: Values = UNKNOWN
    relevant: bool = True
    pair: Pair = field(init=False)

    def __post_init__(self) -> None:
        self.pair = Pair(tuple(self.ids.prompt), tuple(self.ids.chosen), tuple(self.ids.rejected))

    @property
    def pair_id(self) -> str:
        """Of the pairs table."""
        return str(self.row["pair_id"])

    @property
    def language(self) -> str:
        """Of the pairs table."""
        return str(self.row["language"])

    def dropped(self, reason: str, detail: str, failed: bool = False) -> Drop:
        """Why it is not kept."""
        return Drop("pair", self.pair_id, self.language, reason, detail, failed)


def numbered(items: Sequence[Item]) -> list[Pair]:
    """The pairs to give to a pass; every item remembers its place."""
    for place, item in enumerate(items):
        item.given = place
    return [item.pair for item in items]


def without_misfits(items: Sequence[Item], misfits: Sequence[int], drops: list[Drop]) -> list[Item]:
    """The items that fitted in memory, with their places in the results; the others become drops."""
    for place in misfits:
        detail = f"the pair ({items[place].pair.joined} tokens) does not fit in memory, even alone"
        drops.append(items[place].dropped("out_of_memory", detail, failed=True))
    left = [item for item in items if item.given not in set(misfits)]
    for place, item in enumerate(left):
        item.at = place
    return left


def sound(items: Sequence[Item], finite_N: Tensor, norm_N: Tensor, drops: list[Drop]) -> list[Item]:
    """The items whose results are finite and not nothing; the others become drops. finite_N, norm_N: of the results."""
    left = []
    for item in items:
        if not bool(finite_N[item.at]):
            detail = "the backward pass gave values that are not finite"
            drops.append(item.dropped("non_finite_gradient", detail, failed=True))
        elif float(norm_N[item.at]) == 0.0:
            drops.append(item.dropped("zero_gradient", "no layer of the sketch gets a gradient from this pair"))
        else:
            left.append(item)
    return left


def finite_pairs(got: PairSketches) -> Tensor:
    """Which pairs have finite sketches whose norms fit float32 [N]."""
    parts = [part for part in (got.sketch_ND, got.chosen_ND, got.rejected_ND) if part is not None]
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).float() for part in parts]
    return torch.isfinite(torch.stack(norms)).all(dim=0)
