"""What a batch of pairs came to: their sketches and log-probabilities, cut into pairs and joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairSketches:
    """Sketches of N pairs, on the CPU.

    sketch_ND: sketch of d, float32 (float64 for a float64 model). logp_*_N: s(y_w), s(y_l).
    chosen_ND and rejected_ND: sketches of grad s(y_w) and grad s(y_l) when both sides were asked
    for (losses that weight the sides separately).
    """

    sketch_ND: Tensor
    logp_chosen_N: Tensor
    logp_rejected_N: Tensor
    chosen_ND: Tensor | None = None
    rejected_ND: Tensor | None = None

    def rows(self, which: slice | list[int]) -> PairSketches:
        """Some of the pairs, copied so that a batch's memory is not kept alive."""
        parts = [getattr(self, field.name) for field in fields(self)]
        kept: list[Any] = [None if part is None else part[which].clone() for part in parts]
        return PairSketches(*kept)

    def row(self, place: int) -> dict[str, Tensor]:
        """One pair's values, by field."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part[place].clone() for name, part in parts.items() if part is not None}

    @staticmethod
    def of_row(row: Mapping[str, Tensor]) -> PairSketches:
        """What `row` was made of, as the sketches of one pair."""
        return PairSketches(**{name: value[None] for name, value in row.items()})

    @staticmethod
    def cat(parts: Sequence[PairSketches]) -> PairSketches:
        """Concatenate along the pairs."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(PairSketches)]
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return PairSketches(*joined)


Sketched = tuple[PairSketches, int]
"""One pair's sketches: those of its batch, and its place among them."""
