"""From a Gram matrix K of language directions to weights w of the merged direction u = sum_k w_k G_k.

Everything here works in coefficient space: a method sees inner products only and answers with one weight per
language, so that the merged direction of a hundred million parameters costs L x L numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surgery:
    """A method with everything fixed (seed, orders): call it on K [..., L, L] to get w [..., L], float64.

    The same object called twice gives the same weights; refitting under leave-one-out therefore uses the same orders.
    """

    name: str
    solve: Callable[[Tensor], Tensor]

    def __call__(self, gram: Tensor) -> Tensor:
        if gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
            raise ValueError(f"a Gram matrix is square and not empty, got {tuple(gram.shape)}")
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("the Gram matrix has entries that are not finite")
        return self.solve(gram.to(torch.float64))


def draw_orders(n_languages: int, repeats: int, seed: int) -> Tensor:
    """Random orders [R, L, L] int64: orders[r, i] is the order in which direction i meets the others in repeat r."""
    if repeats < 1:
        raise ValueError(f"PCGrad needs at least one order, got {repeats}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = [torch.randperm(n_languages, generator=generator) for _ in range(repeats * n_languages)]
    return torch.stack(rows).view(repeats, n_languages, n_languages)


def pcgrad_coefficients(gram: Tensor, order_LL: Tensor) -> Tensor:
    """PCGrad's coefficient matrix C [..., L, L]: projected direction i is sum_j C_ij G_j (arXiv 2001.06782,
    algorithm 1).

    C starts as the identity. For i, and j != i in order_LL[i]: s = (C_i K)_j is the running direction's product
    with the ORIGINAL G_j; where s < 0 and |G_j| > 0, C_ij -= s / K_jj. Batched over leading dimensions of K, one
    shared order.
    """
    n_languages = gram.shape[-1]
    length = gram.diagonal(dim1=-2, dim2=-1)
    coefficients = torch.eye(n_languages, dtype=gram.dtype).expand(gram.shape).clone()
    for i in range(n_languages):
        running = coefficients[..., i, :]
        for j in order_LL[i].tolist():
            if j == i:
                continue
            product = (running * gram[..., :, j]).sum(dim=-1)
            clash = (product < 0) & (length[..., j] > 0)
            running[..., j] -= torch.where(clash, product / torch.where(clash, length[..., j], 1.0), 0.0)
    return coefficients


def pcgrad(n_languages: int, seed: int = 0, repeats: int = 16) -> Surgery:
    """PCGrad, its weights (column sums of C) averaged over `repeats` random orders drawn from an own generator.

    Every weight is >= 1: PCGrad only re-weights languages, and does nothing when no two of them conflict.
    """
    orders = draw_orders(n_languages, repeats, seed)

    def solve(gram: Tensor) -> Tensor:
        return torch.stack([pcgrad_coefficients(gram, order).sum(dim=-2) for order in orders]).mean(dim=0)

    return Surgery("pcgrad", solve)


def mean(n_languages: int, seed: int = 0, repeats: int = 1) -> Surgery:
    """Equal weights 1/L."""
    return Surgery("mean", lambda gram: torch.full(gram.shape[:-1], 1.0 / gram.shape[-1], dtype=gram.dtype))


def unit_mean(n_languages: int, seed: int = 0, repeats: int = 1) -> Surgery:
    """Mean of the directions at unit norm: w_k = 1 / (L |G_k|), zero for a direction without length."""

    def solve(gram: Tensor) -> Tensor:
        length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        return torch.where(length > 0, 1.0 / (gram.shape[-1] * torch.where(length > 0, length, 1.0)), 0.0)

    return Surgery("unit_mean", solve)


_TORCHJD: Mapping[str, str] = {
    "mgda": "MGDAWeighting",
    "imtl_g": "IMTLGWeighting",
    "aligned_mtl": "AlignedMTLWeighting",
    "upgrad": "UPGradWeighting",
    "dualproj": "DualProjWeighting",
    "cagrad": "CAGradWeighting",
    "gradvac": "GradVacWeighting",
}
_ARGUMENTS: Mapping[str, dict[str, float]] = {"cagrad": {"c": 0.5}}


def torchjd_method(name: str, n_languages: int, seed: int = 0, repeats: int = 1) -> Surgery:
    """A weighting of TorchJD, a fresh one for every matrix (GradVac keeps state), torch's global generator left alone.

    K is divided by its mean diagonal first: the solvers' tolerances are absolute and weights matter up to one factor.
    Raises ImportError, with the package to install, when TorchJD or the method's solver is absent.
    """
    aggregation = importlib.import_module("torchjd.aggregation")
    kind = getattr(aggregation, _TORCHJD[name])
    kind(**_ARGUMENTS.get(name, {}))(torch.eye(2, dtype=torch.float64))  # a missing solver shows here, not hours later

    def solve(gram: Tensor) -> Tensor:
        flat = gram.reshape(-1, *gram.shape[-2:])
        rows = []
        with torch.random.fork_rng(devices=[]):
            for matrix_LL in flat:
                torch.manual_seed(seed)
                scale = float(matrix_LL.diagonal().mean())
                unit_LL = matrix_LL / scale if scale > 0 else matrix_LL
                rows.append(kind(**_ARGUMENTS.get(name, {}))(unit_LL).to(torch.float64))
        return torch.stack(rows).reshape(gram.shape[:-1])

    return Surgery(name, solve)


REGISTRY: Mapping[str, Callable[..., Surgery]] = {
    "pcgrad": pcgrad,
    "mean": mean,
    "unit_mean": unit_mean,
    **{
        name: (lambda n_languages, seed=0, repeats=1, _name=name: torchjd_method(_name, n_languages, seed, repeats))
        for name in _TORCHJD
    },
}
"""Method name -> factory(n_languages, seed, repeats). Methods without randomness ignore seed and repeats."""


def surgery(name: str, n_languages: int, seed: int = 0, repeats: int = 16) -> Surgery:
    """Build a method by name. Raises ValueError that lists the names for an unknown one."""
    if name not in REGISTRY:
        raise ValueError(f"unknown surgery {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name](n_languages, seed=seed, repeats=repeats)
