"""From a Gram matrix K of language directions to weights w of the merged direction u = sum_k w_k G_k.

Everything here works in coefficient space: a method sees inner products only and answers with one weight per
language, so that the merged direction of a hundred million parameters costs L x L numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from schemas.errors import UserError
from stages.conflict.solvers import SOLVERS, packages


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
    with the ORIGINAL G_j; where s < 0 and |G_j| > 0, C_ij -= s / K_jj. All i at once: they do not meet. Batched over
    leading dimensions of K, one shared order.
    """
    n_languages = gram.shape[-1]
    every_L = torch.arange(n_languages)
    length = gram.diagonal(dim1=-2, dim2=-1)
    coefficients = torch.eye(n_languages, dtype=gram.dtype).expand(gram.shape).clone()
    for j_L in order_LL.T:
        product = (coefficients * gram[..., j_L, :]).sum(dim=-1)
        clash = (product < 0) & (length[..., j_L] > 0) & (j_L != every_L)
        step = torch.where(clash, product / torch.where(clash, length[..., j_L], 1.0), 0.0)
        coefficients[..., every_L, j_L] -= step
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


_TORCHJD: Mapping[str, tuple[str, dict[str, float]]] = {
    "mgda": ("MGDAWeighting", {}),
    "imtl_g": ("IMTLGWeighting", {}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
    "gradvac": ("GradVacWeighting", {}),
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.5}),
}
_NASH = {"max_norm": 0.0, "update_weights_every": 1, "optim_niter": 20}


def torchjd_method(name: str, n_languages: int, seed: int = 0, repeats: int = 1) -> Surgery:
    """A weighting of TorchJD, a fresh one for every matrix, torch's global generator left alone.

    K is divided by its mean diagonal first: the solvers' tolerances are absolute and weights matter up to one factor.
    A direction without length is left out and gets weight 0. `gradvac` is stateful, and a fresh one has no history
    to aim at: on one aggregate it is PCGrad with a single order. `nash_mtl` wants vectors: it is given R with R R^T = K.
    Raises ImportError, with the packages to install, when TorchJD or the method's solver is absent; the returned
    method raises UserError when the solver finds no weights.
    """
    missing = [package for package in packages(name) if find_spec(package) is None]
    if missing:
        raise ImportError(f"surgery {name} needs the packages {', '.join(missing)}")

    def solve(gram: Tensor) -> Tensor:
        rows = [_fresh(name, matrix_LL, seed) for matrix_LL in gram.reshape(-1, *gram.shape[-2:])]
        return torch.stack(rows).reshape(gram.shape[:-1])

    return Surgery(name, solve)


def _fresh(name: str, gram_LL: Tensor, seed: int) -> Tensor:
    """Weights [L] of one matrix from a new weighting object."""
    weight_L = torch.zeros(gram_LL.shape[0], dtype=torch.float64)
    (solid_l,) = (gram_LL.diagonal() > 0).nonzero(as_tuple=True)
    if not len(solid_l):
        return weight_L
    part_ll = gram_LL[solid_l[:, None], solid_l]
    part_ll = part_ll / part_ll.diagonal().mean()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "nash_mtl":
            nash = importlib.import_module("torchjd.aggregation").NashMTL(n_tasks=len(solid_l), **_NASH)
            found_l = nash.weighting(factor(part_ll))
        else:
            kind, arguments = _TORCHJD[name]
            found_l = getattr(importlib.import_module("torchjd.aggregation"), kind)(**arguments)(part_ll)
    if not bool(torch.isfinite(found_l).all()):
        raise UserError(
            f"this surgery method found no weights for the Gram matrix {gram_LL.tolist()}",
            where=f"conflict.surgery: {name}",
            fix="Take another one, for example pcgrad.",
        )
    weight_L[solid_l] = found_l.to(torch.float64)
    return weight_L


def factor(gram_LL: Tensor) -> Tensor:
    """R [L, L] with R R^T = K, from the eigenvectors: K may be singular, which a Cholesky factor does not allow."""
    value_L, vector_LL = torch.linalg.eigh(gram_LL)
    return vector_LL * value_L.clamp_min(0.0).sqrt()


REGISTRY: Mapping[str, Callable[..., Surgery]] = {
    "pcgrad": pcgrad,
    "mean": mean,
    "unit_mean": unit_mean,
    **{
        name: (lambda n_languages, seed=0, repeats=1, _name=name: torchjd_method(_name, n_languages, seed, repeats))
        for name in SOLVERS
    },
}
"""Method name -> factory(n_languages, seed, repeats). Methods without randomness ignore seed and repeats."""


def surgery(name: str, n_languages: int, seed: int = 0, repeats: int = 16) -> Surgery:
    """Build a method by name. Raises ValueError that lists the names for an unknown one."""
    if name not in REGISTRY:
        raise ValueError(f"unknown surgery {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name](n_languages, seed=seed, repeats=repeats)
