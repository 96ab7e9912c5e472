"""Mask and protected subspaces together: what an update may be. docs/methods.md section 8.

On the left a column x of an update [O, I] may be non-zero on its active rows s and must have Q^T x = 0, that is Q[s,:]^T x_s = 0: with U an
orthonormal basis of the columns of Q[s,:] (rank-revealing SVD) x_s -= U U^T x_s. Projecting with the whole Q and masking afterwards, or
the other way round, breaks one of the two. A column whose rank is |s| cannot move at all. On the right the same of rows.

Masks of whole rows share one basis a matrix; elementwise masks need one a column, kept under a bound of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from schemas.errors import UserError
from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.shard import LocalRows
from stages.train.optimizers.subspace import Bases, Protected, take_out_

COLUMNS = 256
"""Columns whose factors are found and applied together, padded to the one with the most active rows."""

TOLERANCE = 2e-7
"""Singular values of Q[s,:] up to this are 0: what is left in their directions leaks at most so much of the update."""

FACTOR_BYTES = 1 << 30

MASKED = ("active", "frozen_columns")
"""Names of `Confined.numbers`."""


@dataclass(frozen=True)
class _Columns:
    """Some columns of a matrix. at [C]: which.  rows [C, S]: their active rows, then others.  valid [C, S]: active, and not frozen.
    basis [C, S, R]: U, zero where not valid."""

    at: torch.Tensor
    rows: torch.Tensor
    valid: torch.Tensor
    basis: torch.Tensor


class Confined:
    """Takes out of an update what its parameter's mask or its protected subspaces forbid.

    factor_bytes: most bytes of per-column factors over all parameters.
    """

    def __init__(self, protected: Protected, active: ActiveEntries, factor_bytes: int = FACTOR_BYTES) -> None:
        self.protected, self.active, self.factor_bytes = protected, active, factor_bytes
        self._bytes: dict[str, int] = {}
        self._columns: dict[str, list[_Columns]] = {}
        self._rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._bases: dict[tuple[str, torch.device, torch.dtype], Bases] = {}
        self._frozen: dict[str, tuple[int, int]] = {}
        self._entries: dict[str, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self.protected) or bool(self.active)

    def covers(self, name: str) -> bool:
        """Whether anything is forbidden to the parameter."""
        return self.protected.covers(name) or self.active.covers(name)

    def check(self, name: str, parameter: torch.Tensor, shard: LocalRows | None = None) -> None:
        """Raise UserError, naming the parameter, when mask or bases do not fit it, cannot both hold, or both are there and only
        some of its rows are here."""
        self.protected.check(name, parameter)
        self.active.check(name, parameter)
        if self.active.covers(name):
            self._entries[name] = (self.active.count(name, parameter.numel()), parameter.numel())
        both = self.protected.covers(name) and self.active.covers(name)
        if both and shard is not None and shard.peers is not None:
            raise UserError(
                f"{name} is sharded and has both a mask and protected directions: its columns are not in one process",
                where="active, protected",
                fix="Use one of the two, or parameters that are whole (DistributedDataParallel).",
            )
        if not both or self.active.whole_rows(name):
            return
        if name in self.protected.left and name in self.protected.right:
            raise UserError(
                f"{name} has protected directions on both sides and an elementwise mask: what is left is no product of"
                " the two",
                where="train.orthalign.side: both, train.allo.unit: weight",
                fix="Use side: left or right, or unit: row.",
            )
        mask, q = self._oriented(name)
        self._bytes[name] = cost(mask.sum(0), q.shape[1])
        if sum(self._bytes.values()) > self.factor_bytes:
            raise UserError(
                f"mask and protected subspaces together need {sum(self._bytes.values()):,} bytes of factors up to {name}",
                where=f"train.allo.factor_bytes: {self.factor_bytes:,}",
                fix="Use train.allo.unit: row, a lower ratio or a lower train.orthalign.q_max, or raise the bound.",
            )

    def apply_(self, name: str, update: torch.Tensor, shard: LocalRows | None = None) -> None:
        """Make the update [O, I] (any shape, if only masked), or the rows of it that `shard` says, one that is allowed, in place."""
        masked, kept_free = self.active.covers(name), self.protected.covers(name)
        if not (masked and kept_free):
            self.active.zero_(name, update, shard)
            if kept_free:
                take_out_(update, self._on(name, update, shard), None if shard is None else shard.peers)
            return
        self.active.zero_(name, update)
        if not self.active.whole_rows(name):
            self._by_columns(name, update if name in self.protected.left else update.T)
            return
        if name in self.protected.right:
            take_out_(update, (None, self._on(name, update, shard)[1]))
        if name in self.protected.left:
            self._by_rows(name, update)

    def numbers(self) -> dict[str, float]:
        """active: share of entries that may change, of the masked parameters. frozen_columns: share of columns (rows on the right) with
        active entries that the protected subspaces leave no direction, of the matrices with both, as far as they were used."""
        found = {}
        if self._entries:
            found["active"] = sum(a for a, _ in self._entries.values()) / sum(n for _, n in self._entries.values())
        if self._frozen:
            total = sum(n for _, n in self._frozen.values())
            found["frozen_columns"] = sum(f for f, _ in self._frozen.values()) / max(1, total)
        return found

    def _oriented(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(mask [rows, columns], basis [rows, q]); transposed for the right side."""
        mask = self.active.mask(name)
        left = self.protected.left.get(name)
        return (mask, left) if left is not None else (mask.T, self.protected.right[name])

    def _on(self, name: str, update: torch.Tensor, shard: LocalRows | None) -> Bases:
        """The parameter's bases where the update is: moved there once, and only the rows that are needed."""
        key = (name, update.device, update.dtype)
        if key not in self._bases:
            self._bases[key] = self.protected.bases(name, update, shard)
        return self._bases[key]

    def _by_rows(self, name: str, update: torch.Tensor) -> None:
        """One basis for all columns."""
        if name not in self._rows:
            rows = self.active.mask(name).flatten().cpu()
            basis, rank = _basis(self.protected.left[name].double().cpu()[None, rows])
            frozen = int(rank[0]) == int(rows.sum())
            self._rows[name] = rows.nonzero().flatten(), basis[0].float()
            columns = update.shape[1] if bool(rows.any()) else 0
            self._frozen[name] = (columns if frozen else 0, columns)
        frozen_columns, columns = self._frozen[name]
        if frozen_columns or not columns:
            update.zero_()
            return
        at, held = self._rows[name]
        if at.device != update.device:
            at, held = self._rows[name] = at.to(update.device), held.to(update.device)
        basis = held.to(update.dtype)
        part = update[at]
        update[at] = part - basis @ (basis.T @ part)

    def _by_columns(self, name: str, update: torch.Tensor) -> None:
        """A basis for each column of `update`, which may be a transposed view."""
        if name not in self._columns:
            mask, q = self._oriented(name)
            found = list(_factors(mask.to(update.device), q.to(update.device)))
            self._columns[name] = [columns for columns, _, _ in found]
            self._frozen[name] = (sum(frozen for _, frozen, _ in found), sum(used for _, _, used in found))
        for columns in self._columns[name]:
            basis = columns.basis.to(update.dtype)
            x_CS = update[columns.rows, columns.at[:, None]] * columns.valid
            inside_CR1 = basis.transpose(1, 2) @ x_CS[:, :, None]
            update[columns.rows, columns.at[:, None]] = x_CS - (basis @ inside_CR1)[:, :, 0]


def _layout(counts: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """(columns, most active rows among them), columns of like counts together; those without any are left out."""
    order = counts.argsort(descending=True, stable=True)
    for columns in order[: int((counts > 0).sum())].split(COLUMNS):
        yield columns, int(counts[columns[0]])


def cost(counts: torch.Tensor, q: int) -> int:
    """Bytes of the factors of columns with so many active rows: float32 basis, int64 rows, bool."""
    return sum(len(columns) * most * (4 * min(most, q) + 9) for columns, most in _layout(counts))


def _factors(mask: torch.Tensor, q: torch.Tensor) -> Iterator[tuple[_Columns, int, int]]:
    """(factors, frozen columns, columns with active rows), in groups of columns."""
    counts = mask.sum(0)
    q64 = q.double()
    for at, most in _layout(counts):
        active_CO = mask[:, at].T
        rows = active_CO.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        valid = active_CO.gather(1, rows)
        basis, rank = _basis(q64[rows] * valid[:, :, None])
        frozen = rank >= counts[at]
        basis = (basis * ~frozen[:, None, None]).float()
        yield _Columns(at, rows, valid & ~frozen[:, None], basis), int(frozen.sum()), len(at)


def _basis(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(orthonormal basis [C, S, R] of the columns of each [S, q], zero columns beyond its rank; ranks [C])."""
    left, values, _ = torch.linalg.svd(parts, full_matrices=False)
    solid = values > TOLERANCE
    return left * solid[:, None, :], solid.sum(1)
