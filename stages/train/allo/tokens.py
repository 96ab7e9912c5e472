"""Which tokens of rejected answers are unlearned, and which are the key tokens of learning. docs/methods.md section 7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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


def key_tokens(rewards: torch.Tensor, fraction: float) -> torch.Tensor:
    """Positions, ascending, of the k = max(1, round(fraction * n)) tokens of lowest reward [n]; ties go to the earlier one."""
    k = max(1, round(fraction * len(rewards)))
    return rewards.sort(stable=True).indices[:k].sort().values


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
        values = [reward.double() for reward in rewards]
        columns = [
            values,
            [row < 0.5 for row in values],
            [key_tokens(row, fraction) for row in values],
            ref_logps,
        ]
        arrays = [_lists(rows, field.type) for rows, field in zip(columns, _SCHEMA, strict=True)]
        return cls(pa.Table.from_arrays(arrays, schema=_SCHEMA))

    def weights(self) -> pa.Array:
        """w_t of forgetting: 1 where the token is unlearned, else 0."""
        unlearned = self.column("unlearned")
        lengths = pc.list_value_length(unlearned).to_numpy()
        return _cut(pc.list_flatten(unlearned).cast(pa.float32()), lengths, pa.list_(pa.float32()))

    def column(self, name: str) -> pa.Array:
        """One column."""
        return self.table[name].combine_chunks()

    def counts(self) -> tuple[int, int, int]:
        """(rejected tokens, unlearned ones, pairs without any to unlearn)."""
        unlearned = self.column("unlearned")
        flags, rows = pc.list_flatten(unlearned).to_numpy(zero_copy_only=False), pc.list_parent_indices(unlearned)
        each = np.bincount(rows.to_numpy()[flags], minlength=len(unlearned))
        return len(flags), int(each.sum()), int((each == 0).sum())

    def save(self, path: Path) -> None:
        """As Parquet."""
        pq.write_table(self.table, path)

    @classmethod
    def load(cls, path: Path) -> RejectedTokens:
        """What `save` wrote."""
        return cls(pq.read_table(path, schema=_SCHEMA))


def _lists(rows: Sequence[torch.Tensor], kind: pa.DataType) -> pa.Array:
    """One list a row, from one buffer."""
    flat = torch.cat([row.detach().cpu() for row in rows]).numpy() if rows else np.empty(0)
    return _cut(pa.array(flat).cast(kind.value_type), np.array([len(row) for row in rows], np.int32), kind)


def _cut(flat: pa.Array, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, kind)
