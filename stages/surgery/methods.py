"""From a Gram matrix K of language directions to weights w of the merged direction u = sum_k w_k G_k.

Everything here works in coefficient space: a method sees inner products only and answers with one weight per
language, so that the merged direction of a hundred million parameters costs L x L numbers. A new method of ours is a function here under `_ours`,
one of TorchJD's a line in `solvers.py`; its name is listed in `ConflictConfig.surgery`, and
where its direction is as long as the gradients are, in `TrainConfig.language_surgery`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from schemas.errors import UserError
from stages.surgery.bargains import min_norm_weights, nash_weights
from stages.surgery.pcgrad import draw_orders, pcgrad_weights
from stages.surgery.solvers import TORCHJD, packages

_REGULAR = 1e-9
"""Added to unit diagonals, so that a quadratic program over directions that depend on each other has one answer."""


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


Solve = Callable[[Tensor], Tensor]
_OURS: dict[str, Callable[[int, int, int], Solve]] = {}


def _ours(factory: Callable[[int, int, int], Solve]) -> Callable[[int, int, int], Solve]:
    """A method of this project under its function's name: from languages, seed and orders to the function of K."""
    _OURS[factory.__name__] = factory
    return factory


@_ours
def pcgrad(n_languages: int, seed: int, repeats: int) -> Solve:
    """PCGrad, averaged over `repeats` random orders drawn from an own generator. It only re-weights languages, and does nothing when no two of
    them conflict."""
    orders = draw_orders(n_languages, repeats, seed)
    return lambda gram: pcgrad_weights(gram, orders)


@_ours
def mean(n_languages: int, seed: int, repeats: int) -> Solve:
    """Equal weights 1/L."""
    return lambda gram: torch.full(gram.shape[:-1], 1.0 / gram.shape[-1], dtype=gram.dtype)


@_ours
def unit_mean(n_languages: int, seed: int, repeats: int) -> Solve:
    """Mean of the directions at unit norm: w_k = 1 / (L |G_k|), zero for a direction without length."""

    def solve(gram: Tensor) -> Tensor:
        length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        return torch.where(length > 0, 1.0 / (gram.shape[-1] * torch.where(length > 0, length, 1.0)), 0.0)

    return solve


@_ours
def mgda(n_languages: int, seed: int, repeats: int) -> Solve:
    """MGDA: the convex combination of least norm, exactly."""
    return _one_by_one("mgda", min_norm_weights)


@_ours
def nash_mtl(n_languages: int, seed: int, repeats: int) -> Solve:
    """Nash-MTL: every language gains alike in proportion."""
    return _one_by_one("nash_mtl", nash_weights)


def torchjd_method(name: str, seed: int) -> Solve:
    """A weighting of TorchJD, a fresh one for every matrix, torch's global generator left alone.

    K is divided by its mean diagonal first: the solvers' tolerances are absolute and weights matter up to one factor. `gradvac` is
    stateful, and a fresh one has no history to aim at: on one aggregate it is PCGrad with a single order. The quadratic programs are solved
    for unit directions (see `_dual_cone`).
    Raises ImportError, with the packages to install, when TorchJD or the method's solver is absent.
    """
    missing = [package for package in packages(name) if find_spec(package) is None]
    if missing:
        raise ImportError(f"surgery {name} needs the packages {', '.join(missing)}")
    method = TORCHJD[name]

    def weights(gram_LL: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind: Any = getattr(importlib.import_module("torchjd.aggregation"), method.weighting)
            if method.dual_cone:
                return _dual_cone(kind, gram_LL)
            found_L = kind(**method.arguments)(gram_LL / gram_LL.diagonal().mean())
            return _uphill(gram_LL, found_L) if method.gains_alike else found_L

    return _one_by_one(name, weights)


def _dual_cone(kind: Any, gram_LL: Tensor) -> Tensor:
    """w of the least w K w with w >= u (arXiv 2406.16232, proposition 1), solved for z = w |G|, which sees unit directions.

    TorchJD adds 1e-4 of the trace to the diagonal, which is 9% of a direction a thirtieth as long as the others: what it promises no
    language (a loss) then happens to it.
    """
    length_L = gram_LL.diagonal().sqrt()
    unit_LL = gram_LL / (length_L[:, None] * length_L)
    projector = importlib.import_module("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=_REGULAR)
    lower_L = length_L / length_L.mean() / len(gram_LL)
    return kind(pref_vector=lower_L, projector=projector)(unit_LL) * (length_L.mean() / length_L)


def _uphill(gram_LL: Tensor, weight_L: Tensor) -> Tensor:
    """Weights whose equal gains (IMTL-G's are 1 / sum v) are gains; none where TorchJD found 0 = sum v."""
    gain = (gram_LL @ weight_L.to(gram_LL.dtype)).sum()
    return weight_L * gain.sign() if gain != 0 else torch.full_like(weight_L, torch.nan)


def _one_by_one(name: str, weights: Solve) -> Solve:
    """A function of one matrix of directions that all have length, for any number of matrices; the others get weight 0.

    The result raises UserError when it finds no weights.
    """

    def one(gram_LL: Tensor) -> Tensor:
        weight_L = torch.zeros(len(gram_LL), dtype=torch.float64)
        (solid_l,) = (gram_LL.diagonal() > 0).nonzero(as_tuple=True)
        if not len(solid_l):
            return weight_L
        try:
            found_l = weights(gram_LL[solid_l[:, None], solid_l])
            why = ""
        except _unsolved() as error:
            found_l, why = torch.full((len(solid_l),), torch.nan), f": {error}"
        if not bool(torch.isfinite(found_l).all()):
            raise UserError(
                f"this surgery method found no weights for the Gram matrix {_shown(gram_LL)}{why}",
                where=f"surgery: {name}",
                fix="Take another one, for example pcgrad.",
            )
        weight_L[solid_l] = found_l.to(torch.float64)
        return weight_L

    def solve(gram: Tensor) -> Tensor:
        rows = [one(matrix_LL) for matrix_LL in gram.reshape(-1, *gram.shape[-2:])]
        return torch.stack(rows).reshape(gram.shape[:-1])

    return solve


def _unsolved() -> tuple[type[Exception], ...]:
    """What solvers raise that find no weights; qpsolvers' errors are no ValueErrors."""
    solvers = sys.modules.get("qpsolvers")
    return (ValueError,) if solvers is None else (ValueError, solvers.exceptions.QPError)


def _shown(gram_LL: Tensor, languages: int = 4) -> str:
    more = f" (of {len(gram_LL)} languages)" if len(gram_LL) > languages else ""
    return f"{[[float(f'{v:.4g}') for v in row] for row in gram_LL[:languages, :languages].tolist()]}{more}"


METHODS = (*_OURS, *TORCHJD)
"""Every name in `conflict.surgery`."""
SUMMED = ("pcgrad", "gradvac")
"""Those whose direction is the sum of the gradients where none conflict; that of the others is then their mean, or has no such length."""
WEIGHTED: Mapping[str, Literal["scaled", "after"]] = {
    "pcgrad": "scaled",
    "mean": "after",
    "unit_mean": "after",
    **{name: method.weighted for name, method in TORCHJD.items() if method.weighted},
}
"""How a method takes weights m of the languages. scaled: it sees the gradients m_l G_l of weighted losses, as in training on sum m_l L_l (for upgrad and
dualproj the same as a preference vector of m). after: its weights are multiplied by m, as scaling is what it takes out, or does not change it. The others
find weights that no scaling changes (mgda: that it turns around), so that there is nothing for m to say."""


def surgery(
    name: str, n_languages: int, seed: int = 0, repeats: int = 16, weight_L: Sequence[float] | None = None
) -> Surgery:
    """Build a method by name; those without randomness ignore seed and repeats. weight_L: of the languages, not negative; only their ratios count.
    Raises ValueError that lists the names for an unknown one, for one that takes no weights, and for weights that are all 0."""
    if name in _OURS:
        solve = _OURS[name](n_languages, seed, repeats)
    elif name in TORCHJD:
        solve = torchjd_method(name, seed)
    else:
        raise ValueError(f"unknown surgery {name!r}; known: {', '.join(METHODS)}")
    return Surgery(name, solve if weight_L is None else _weighted(name, solve, weight_L))


def _weighted(name: str, solve: Solve, weight_L: Sequence[float]) -> Solve:
    if name not in WEIGHTED:
        raise ValueError(f"surgery {name} takes no weights of languages; these do: {', '.join(WEIGHTED)}")
    given = torch.tensor(weight_L, dtype=torch.float64)
    if not bool((given >= 0).all()) or not bool((given > 0).any()):
        raise ValueError("weights of languages are not negative, and not all of them are 0")
    mean_L = given / given.mean()
    if WEIGHTED[name] == "after":
        return lambda gram: solve(gram) * mean_L
    return lambda gram: solve(gram * mean_L[:, None] * mean_L) * mean_L
