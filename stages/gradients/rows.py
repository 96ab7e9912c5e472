"""Token rows: a prompt and one completion as ids, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.gradients.sharing import Sharing, moved_to


@dataclass(frozen=True, slots=True)
class BatchRow:
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
    def rows(self) -> tuple[BatchRow, BatchRow]:
        """(chosen row, rejected row). Raises ValueError when a part is empty."""
        return BatchRow(self.prompt, self.chosen), BatchRow(self.prompt, self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer row: what batching sorts by."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def joined(self) -> int:
        """Tokens of the row [prompt | chosen | rejected]."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Padded rows and where their completions are predicted.

    ids_BT int64. M = completion tokens of the whole batch, completion by completion; for each, `row_M` and `at_M` say
    which position predicts it, `target_M` the token, `completion_M` and `place_M` its completion and its index inside
    it. `shape` = (completions, tokens of the longest). `sharing` is set when a row holds both sides of a pair.
    """

    ids_BT: Tensor
    row_M: Tensor
    at_M: Tensor
    target_M: Tensor
    completion_M: Tensor
    place_M: Tensor
    shape: tuple[int, int]
    sharing: Sharing | None = None

    @classmethod
    def build(cls, rows: Sequence[BatchRow], device: torch.device | str = "cpu", pad_id: int = 0) -> RowBatch:
        """Right-pad rows, one completion each. Padding needs no attention mask: a causal model's real positions never
        see what follows."""
        if not rows:
            raise ValueError("a batch needs at least one row")
        ids_BT = _padded([row.prompt + row.completion for row in rows], pad_id)
        spans = [(b, _predicting(len(r.prompt), len(r.prompt), len(r.completion))) for b, r in enumerate(rows)]
        return cls._of(ids_BT, spans, [row.completion for row in rows], device)

    @classmethod
    def build_shared(cls, pairs: Sequence[Pair], device: torch.device | str = "cpu", pad_id: int = 0) -> RowBatch:
        """One row [prompt | chosen | rejected] a pair; completions are every chosen side, then every rejected one.

        The first rejected token, like the first chosen one, is predicted from the last prompt position.
        """
        if not pairs or not all(pair.prompt and pair.chosen and pair.rejected for pair in pairs):
            raise ValueError("a shared batch needs pairs with prompt, chosen and rejected tokens")
        ids_BT = _padded([pair.prompt + pair.chosen + pair.rejected for pair in pairs], pad_id)
        lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
        chosen = [(b, _predicting(p, p, c)) for b, (p, c, _) in enumerate(lengths)]
        rejected = [(b, _predicting(p, p + c, r)) for b, (p, c, r) in enumerate(lengths)]
        completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        sharing = Sharing.build(lengths, device)
        return cls._of(ids_BT, chosen + rejected, completions, device, sharing)

    @classmethod
    def _of(
        cls,
        ids_BT: Tensor,
        spans: Sequence[tuple[int, Sequence[int]]],
        completions: Sequence[tuple[int, ...]],
        device: torch.device | str,
        sharing: Sharing | None = None,
    ) -> RowBatch:
        columns = (
            [b for b, span in spans for _ in span],
            [at for _, span in spans for at in span],
            [token for completion in completions for token in completion],
            [n for n, completion in enumerate(completions) for _ in completion],
            [k for completion in completions for k in range(len(completion))],
        )
        shape = (len(completions), max(len(completion) for completion in completions))
        row_M, at_M, target_M, completion_M, place_M = (moved_to(torch.tensor(column), device) for column in columns)
        return cls(moved_to(ids_BT, device), row_M, at_M, target_M, completion_M, place_M, shape, sharing)

    def spread(self, value_M: Tensor) -> Tensor:
        """[M] values per completion token as [completions, C] with zeros after each completion's end;
        differentiable."""
        return value_M.new_zeros(self.shape).index_put((self.completion_M, self.place_M), value_M)


def _padded(rows: Sequence[tuple[int, ...]], fill: int) -> Tensor:
    """[B, T] int64, `fill` after each row's end."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + (fill,) * (longest - len(row)) for row in rows], dtype=torch.int64)


def _predicting(prompt: int, start: int, length: int) -> list[int]:
    """Positions that predict a completion at [start, start + length): the prompt's last, then its own but the last."""
    return [prompt - 1, *range(start, start + length - 1)]
