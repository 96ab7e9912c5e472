"""Token rows: a prompt and one completion as ids, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of a prompt and of one completion (its end-of-turn token included)."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.completion:
            raise ValueError("a row needs at least one prompt token and one completion token")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a preference pair: y_w = chosen and y_l = rejected after the same prompt."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def rows(self) -> tuple[Row, Row]:
        """(chosen row, rejected row). Raises ValueError when a part is empty."""
        return Row(self.prompt, self.chosen), Row(self.prompt, self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer row: what batching sorts by."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Padded rows and where their completions are predicted.

    ids_BT int64. M = completion tokens of the whole batch in row order; for each, `row_M` and
    `at_M` say which position predicts it (the one before it), `target_M` the token, `place_M` its
    index inside its completion.
    """

    ids_BT: Tensor
    row_M: Tensor
    at_M: Tensor
    target_M: Tensor
    place_M: Tensor
    completion_B: Tensor

    @classmethod
    def build(cls, rows: Sequence[Row], device: torch.device | str = "cpu", pad_id: int = 0) -> RowBatch:
        """Right-pad rows. Padding needs no attention mask: a causal model's real positions never
        see what follows."""
        if not rows:
            raise ValueError("a batch needs at least one row")
        ids_BT = torch.full((len(rows), max(len(r) for r in rows)), pad_id, dtype=torch.int64)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row)] = torch.tensor(row.prompt + row.completion, dtype=torch.int64)
        row_M = torch.tensor([b for b, r in enumerate(rows) for _ in r.completion])
        place_M = torch.tensor([k for r in rows for k in range(len(r.completion))])
        prompt_B = torch.tensor([len(r.prompt) for r in rows])
        at_M = prompt_B[row_M] - 1 + place_M
        target_M = ids_BT[row_M, at_M + 1]
        completion_B = torch.tensor([len(r.completion) for r in rows])
        return cls(*(t.to(device) for t in (ids_BT, row_M, at_M, target_M, place_M, completion_B)))

    def spread(self, value_M: Tensor) -> Tensor:
        """[M] values per completion token as [B, C] with zeros after each completion's end;
        differentiable."""
        shape = (self.ids_BT.shape[0], int(self.completion_B.max()))
        return value_M.new_zeros(shape).index_put((self.row_M, self.place_M), value_M)
