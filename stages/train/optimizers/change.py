"""What an objective did to a matrix, as its leading singular triplets. METHODS.md section 6, arXiv 2509.24610."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.errors import UserError


@dataclass(frozen=True)
class Change:
    """Leading part of Delta W = W_after - W_before [O, I]: left [O, q], values [q] descending, right [I, q], float64 on the CPU.

    energy: squared Frobenius norm of the whole of Delta W, what was cut off included.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    energy: float

    @classmethod
    def of(cls, name: str, matrix: torch.Tensor, q_max: int) -> Change:
        """By SVD. Raises UserError, naming the parameter, for what is not a finite matrix."""
        if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
            raise UserError(f"The change of {name} is not a finite matrix", where="orthalign")
        left, values, right_h = torch.linalg.svd(matrix.detach().to("cpu", torch.float64), full_matrices=False)
        return cls._cut(left, values, right_h.T, q_max)

    @classmethod
    def of_factors(cls, name: str, b_OR: torch.Tensor, a_RI: torch.Tensor, q_max: int) -> Change:
        """Of B A without forming it: QR of B and of A^T, then the SVD of the r x r core (LoRA)."""
        if not (bool(torch.isfinite(b_OR).all()) and bool(torch.isfinite(a_RI).all())):
            raise UserError(f"The change of {name} is not a finite matrix", where="orthalign")
        left_OR, upper_b = torch.linalg.qr(b_OR.detach().to("cpu", torch.float64))
        right_IR, upper_a = torch.linalg.qr(a_RI.detach().to("cpu", torch.float64).T)
        left, values, right_h = torch.linalg.svd(upper_b @ upper_a.T)
        return cls._cut(left_OR @ left, values, right_IR @ right_h.T, q_max)

    @classmethod
    def _cut(cls, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, q_max: int) -> Change:
        solid = int((values > values[:1] * 1e-12).sum())
        q = min(q_max, solid)
        return cls(left[:, :q].clone(), values[:q].clone(), right[:, :q].clone(), float(values.square().sum()))

    def count(self, energy: float) -> int:
        """The fewest leading values that hold `energy` of the squared norm, or all there are."""
        if not self.energy:
            return 0
        share = self.values.square().cumsum(0) / self.energy
        return min(int((share < energy * (1 - 1e-12)).sum()) + 1, len(self.values))

    def first(self, q: int) -> Change:
        """The q leading triplets."""
        return Change(self.left[:, :q], self.values[:q], self.right[:, :q], self.energy)

    def matrix(self) -> torch.Tensor:
        """left diag(values) right^T [O, I], float64."""
        return (self.left * self.values) @ self.right.T
