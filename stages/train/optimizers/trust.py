"""A spectral trust region: |W - W_start|_2 <= radius, by scaling the displacement. METHODS.md section 6."""

from __future__ import annotations

from typing import Any

import torch

MARGIN = 1.05
ITERATIONS, BLOCK = 2, 4
"""Power iteration approaches the norm from below: its estimate, continued from the last step's vectors, is taken 5% larger. At
a checkpoint `exact` says what the norm is."""


def keep_within(state: dict[str, Any], displacement: torch.Tensor, radius: float) -> float:
    """Scale the displacement, in place, so that its spectral norm stays within `radius`; returns the factor.

    Matrices: by power iteration, skipped where the Frobenius norm, an upper bound, is within already. Other shapes: by the
    Euclidean norm. state["directions"]: right singular vectors found so far.
    """
    bound = float(displacement.norm())
    if bound <= radius:
        return 1.0
    if displacement.ndim == 2:
        bound = min(bound, MARGIN * _largest(state, displacement))
        if bound <= radius:
            return 1.0
    displacement.mul_(radius / bound)
    return radius / bound


def exact(displacement: torch.Tensor) -> float:
    """The spectral norm by SVD, in float64 (Euclidean norm of anything but a matrix)."""
    wide = displacement.double()
    return float(torch.linalg.matrix_norm(wide, 2) if wide.ndim == 2 else wide.norm())


def _largest(state: dict[str, Any], matrix: torch.Tensor) -> float:
    """The largest singular value, from below, by block power iteration: several vectors, so that two singular values of
    nearly one size, or a new one overtaking, do not fool it."""
    block = state.get("directions")
    rounds = ITERATIONS
    if block is None:
        random = torch.Generator().manual_seed(0)
        block = torch.randn(matrix.shape[1], min(BLOCK, *matrix.shape), generator=random)
        block, rounds = block.to(matrix.device, matrix.dtype), 10 * ITERATIONS
    for _ in range(rounds):
        block = torch.linalg.qr(matrix.T @ (matrix @ block)).Q
    state["directions"] = block
    return float(torch.linalg.matrix_norm(matrix @ block, 2))
