"""A spectral trust region: |W - W_start|_2 <= radius, by scaling the displacement. docs/methods.md section 6."""

from __future__ import annotations

from typing import Any

import torch

from stages.train.optimizers.change import spectral_norm
from stages.train.optimizers.shard import LocalRows, add_up

MARGIN = 1.05
ITERATIONS, BLOCK = 2, 4
"""Power iteration approaches the norm from below: its estimate, continued from the last step's vectors, is taken 5% larger.
What that misses, `displacement.bounded` finds by `exact` when an objective ends."""

_SQUARINGS = 9
"""Of a Gram matrix of unit trace: its 512th power leaves of eigenvalues below 0.99 of the largest less than 1%."""


def factors(
    ways: list[torch.Tensor], states: list[dict[str, Any]], shards: list[LocalRows], radius: float
) -> list[float | torch.Tensor | None]:
    """What to scale every displacement by so that its norm stays within `radius`; None: by nothing.

    Matrices: spectral norm by power iteration, states[i]["directions"] being the right singular vectors found so far. Other shapes: Euclidean
    norm. ways: the rows held here. On a CPU what is within its Frobenius norm already is left alone; on a GPU, which nothing here
    waits for, the factor is a tensor and the iteration always runs.
    """
    peers = shards[0].peers
    if peers is None:
        bounds = torch.stack(torch._foreach_norm(ways))
    else:
        bounds = add_up(torch.stack([way.double().square().sum() for way in ways]), peers).sqrt()
    if ways[0].device.type != "cpu":
        return [_on_device(*given, radius) for given in zip(bounds.unbind(), ways, states, shards, strict=True)]
    return [_factor(*given, radius) for given in zip(bounds.tolist(), ways, states, shards, strict=True)]


def _factor(bound: float, way: torch.Tensor, state: dict[str, Any], shard: LocalRows, radius: float) -> float | None:
    if bound > radius and way.ndim == 2:
        bound = min(bound, MARGIN * _largest(state, way, shard))
    return radius / bound if bound > radius else None


def _largest(state: dict[str, Any], way: torch.Tensor, shard: LocalRows) -> float:
    """The largest singular value, from below."""
    seen = _seen(state, way, shard)
    if shard.peers is None:
        return float(torch.linalg.matrix_norm(seen, 2))
    gram = add_up(seen.double().T @ seen.double(), shard.peers)
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())


def _on_device(
    bound: torch.Tensor, way: torch.Tensor, state: dict[str, Any], shard: LocalRows, radius: float
) -> torch.Tensor:
    """The same on a GPU. Largest eigenvalue of a small Gram matrix: by squaring it, for eigvalsh would wait."""
    if way.ndim == 2:
        seen = _seen(state, way, shard).double()
        gram = add_up(seen.T @ seen, shard.peers)
        trace = gram.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
        power = gram / trace
        for _ in range(_SQUARINGS):
            power = power @ power
            power = power / power.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
        largest = (gram * power).sum().clamp(min=0).sqrt()
        bound = torch.minimum(bound.double(), MARGIN * largest)
    return torch.where(bound > radius, radius / bound, 1.0).to(way.dtype)


def exact(displacement: torch.Tensor) -> float:
    """The spectral norm, in float64 (Euclidean norm of anything but a matrix)."""
    return spectral_norm(displacement) if displacement.ndim == 2 else float(displacement.double().norm())


def _seen(state: dict[str, Any], matrix: torch.Tensor, shard: LocalRows) -> torch.Tensor:
    """M X [rows, 4], whose largest singular value is M's from below, X orthonormal by block power iteration: several vectors, so that two
    singular values of nearly one size, or a new one overtaking, do not fool it. matrix: the rows held here; its products with M^T are summed
    over the processes, so that all continue with the same block."""
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
    return matrix @ block
