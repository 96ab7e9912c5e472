"""What an objective did to a matrix, as its leading singular triplets. docs/methods.md section 6, arXiv 2509.24610."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.errors import UserError

_SLICE = 1 << 24
"""Elements of a matrix that are held in float64 at a time."""
_SOLID = 1e-7
"""Singular values below this share of the largest are rounding: float32 weights resolve no more, nor does a Gram matrix."""


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
        """By the eigenvectors V of the smaller Gram matrix, in float64, on the device the matrix is on; then the SVD of the
        matrix times V, so that both sides are orthonormal whatever the spectrum.

        Not a full SVD: O(L m^2) products and one m x m eigenproblem for L x m, L >= m. `energy` is the Gram matrix's trace, that
        is the squared Frobenius norm itself, so the share that `values` hold is exact. Raises UserError, naming the parameter, for
        what is not a finite matrix.
        """
        if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
            raise UserError(f"The change of {name} is not a finite matrix", where="orthalign")
        parts = _tall(matrix)
        gram_mm = _gram(parts)
        vectors_mq = torch.linalg.eigh(gram_mm).eigenvectors[:, -q_max:]
        long_Lq, upper_qq = torch.linalg.qr(torch.cat([part.double() @ vectors_mq for part in parts]))
        left, values, right_h = torch.linalg.svd(upper_qq)
        sides = long_Lq @ left, vectors_mq @ right_h.T
        if matrix.shape[0] < matrix.shape[1]:
            sides = sides[1], sides[0]
        return cls._cut(sides[0], values, sides[1], q_max, float(gram_mm.diagonal().sum()))

    @classmethod
    def of_factors(cls, name: str, b_OR: torch.Tensor, a_RI: torch.Tensor, q_max: int) -> Change:
        """Of B A without forming it: QR of B and of A^T, then the SVD of the r x r core (LoRA)."""
        if not (bool(torch.isfinite(b_OR).all()) and bool(torch.isfinite(a_RI).all())):
            raise UserError(f"The change of {name} is not a finite matrix", where="orthalign")
        left_OR, upper_b = torch.linalg.qr(b_OR.detach().double())
        right_IR, upper_a = torch.linalg.qr(a_RI.detach().double().T)
        left, values, right_h = torch.linalg.svd(upper_b @ upper_a.T)
        return cls._cut(left_OR @ left, values, right_IR @ right_h.T, q_max, float(values.square().sum()))

    @classmethod
    def _cut(cls, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, q_max: int, energy: float) -> Change:
        q = min(q_max, int((values > values[:1] * _SOLID).sum()))
        return cls(left[:, :q].cpu().clone(), values[:q].cpu().clone(), right[:, :q].cpu().clone(), energy)

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


def spectral_norm(matrix: torch.Tensor) -> float:
    """The largest singular value of a finite matrix, from the largest eigenvalue of its smaller Gram matrix in float64."""
    return float(torch.linalg.eigvalsh(_gram(_tall(matrix)))[-1].clamp(min=0).sqrt())


def _tall(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slices of rows of the matrix [L, m], L >= m, transposed if need be."""
    tall_Lm = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().T
    return tall_Lm.split(max(1, _SLICE // tall_Lm.shape[1]))


def _gram(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """M^T M [m, m] in float64."""
    short = parts[0].shape[1]
    gram_mm = torch.zeros(short, short, dtype=torch.float64, device=parts[0].device)
    for part in parts:
        wide = part.double()
        gram_mm.addmm_(wide.T, wide)
    return gram_mm
