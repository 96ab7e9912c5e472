"""Which tokens of rejected answers are unlearned, and which are the key tokens of learning. METHODS.md section 7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

_SCHEMA = pa.schema(
    [
        ("reward", pa.list_(pa.float64())),
        ("unlearned", pa.list_(pa.bool_())),
        ("key_tokens", pa.list_(pa.int32())),
        ("ref_token_logps", pa.list_(pa.float32())),
    ]
)


def key_tokens(rewards: Sequence[float], fraction: float) -> list[int]:
    """Positions, ascending, of the k = max(1, round(fraction * n)) tokens of lowest reward; ties go to the earlier one."""
    k = max(1, round(fraction * len(rewards)))
    return sorted(sorted(range(len(rewards)), key=lambda t: (rewards[t], t))[:k])


def implicit_rewards(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(beta * log pi/pi_ref) of each token, float64: below 0.5 where the trained model finds the token less likely."""
    return torch.sigmoid(beta * (logps.double() - ref_logps.double()))


@dataclass(frozen=True)
class RejectedTokens:
    """For each pair a list about its rejected tokens; columns of `table`: reward (a probability), unlearned (reward < 0.5), key_tokens
    (positions), ref_token_logps (of the model before forgetting)."""

    table: pa.Table

    @classmethod
    def chosen_by(
        cls, rewards: Sequence[torch.Tensor], ref_logps: Sequence[torch.Tensor], fraction: float
    ) -> RejectedTokens:
        """By the rewards [n] of every pair's rejected answer."""
        values = [reward.double().tolist() for reward in rewards]
        columns = [
            values,
            [[value < 0.5 for value in row] for row in values],
            [key_tokens(row, fraction) for row in values],
            [logps.tolist() for logps in ref_logps],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        return cls(pa.Table.from_arrays(arrays, schema=_SCHEMA))

    def weights(self) -> pa.Array:
        """w_t of forgetting: 1 where the token is unlearned, else 0."""
        rows = [[float(flag) for flag in row] for row in self.table["unlearned"].to_pylist()]
        return pa.array(rows, pa.list_(pa.float32()))

    def column(self, name: str) -> pa.Array:
        """One column."""
        return self.table[name].combine_chunks()

    def counts(self) -> tuple[int, int, int]:
        """(rejected tokens, unlearned ones, pairs without any to unlearn)."""
        rows = self.table["unlearned"].to_pylist()
        return sum(map(len, rows)), sum(map(sum, rows)), sum(not any(row) for row in rows)

    def save(self, path: Path) -> None:
        """As Parquet."""
        pq.write_table(self.table, path)

    @classmethod
    def load(cls, path: Path) -> RejectedTokens:
        """What `save` wrote."""
        return cls(pq.read_table(path, schema=_SCHEMA))
