"""A spectral trust region: |W - W_start|_2 <= radius, by scaling the displacement. METHODS.md section 6."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from stages.train.optimizers.change import spectral_norm
from stages.train.optimizers.shard import Shard, add_up

MARGIN = 1.05
ITERATIONS, BLOCK = 2, 4
"""Power iteration approaches the norm from below: its estimate, continued from the last step's vectors, is taken 5% larger.
What that misses, `displacement.bounded` finds by `exact` when an objective ends."""


def norms(displacements: list[torch.Tensor], peers: dist.ProcessGroup | None) -> list[float]:
    """Frobenius (Euclidean) norms, brought from the device at once. peers: the processes that hold the other rows."""
    if peers is None:
        return torch.stack(torch._foreach_norm(displacements)).tolist()
    squares = torch.stack([part.double().square().sum() for part in displacements])
    return add_up(squares, peers).sqrt().tolist()


def keep_within(state: dict[str, Any], displacement: torch.Tensor, radius: float, bound: float, shard: Shard) -> float:
    """Scale the displacement, in place, so that its spectral norm stays within `radius`; returns the factor.

    Matrices: by power iteration. Other shapes: by the Euclidean norm. bound: of `norms`; where it is within already there is nothing to
    scale. state["directions"]: right singular vectors found so far. shard: the rows `displacement` is.
    """
    if displacement.ndim == 2:
        bound = min(bound, MARGIN * _largest(state, displacement, shard))
        if bound <= radius:
            return 1.0
    displacement.mul_(radius / bound)
    return radius / bound


def exact(displacement: torch.Tensor) -> float:
    """The spectral norm, in float64 (Euclidean norm of anything but a matrix)."""
    return spectral_norm(displacement) if displacement.ndim == 2 else float(displacement.double().norm())


def _largest(state: dict[str, Any], matrix: torch.Tensor, shard: Shard) -> float:
    """The largest singular value, from below, by block power iteration: several vectors, so that two singular values of
    nearly one size, or a new one overtaking, do not fool it. matrix: the rows held here; its products with M^T are summed over
    the processes, so that all continue with the same block."""
    rows, peers = shard.shape[0], shard.peers
    block = state.get("directions")
    rounds = ITERATIONS
    if block is None:
        random = torch.Generator().manual_seed(0)
        block = torch.randn(matrix.shape[1], min(BLOCK, rows, matrix.shape[1]), generator=random)
        block, rounds = block.to(matrix.device, matrix.dtype), 10 * ITERATIONS
    for _ in range(rounds):
        block = torch.linalg.qr(add_up(matrix.T @ (matrix @ block), peers)).Q
    state["directions"] = block
    seen = matrix @ block
    if peers is None:
        return float(torch.linalg.matrix_norm(seen, 2))
    gram = add_up(seen.double().T @ seen.double(), peers)
    return float(torch.linalg.eigvalsh(gram.cpu())[-1].clamp(min=0).sqrt())
