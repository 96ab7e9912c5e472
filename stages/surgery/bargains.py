"""Two methods with one best answer, found exactly: TorchJD's solvers stop early (MGDA after 100 Frank-Wolfe steps) or answer equal weights when
they fail (Nash-MTL)."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 500
_TOLERANCE = 1e-12
_ENDLESS = 1e6
"""An alpha of this size, directions being of length 1, grows for ever: float64 no longer knows alpha K alpha, of 1e12, to the 1e-6 asked for."""


def min_norm_weights(gram_LL: Tensor) -> Tensor:
    """w [L] on the simplex with the least w K w: MGDA (arXiv 1810.04650, equation 3).

    With z = t w the least z K z + c (sum z - 1)^2 over z >= 0 has the same w, whatever c > 0: non-negative least squares, solved by
    Lawson and Hanson's active set (Solving Least Squares Problems, 1974, chapter 23), in finitely many steps, to float64's digits: exact where no
    direction is more than a million times as long as another. K may be singular.
    """
    n = len(gram_LL)
    scale = gram_LL.diagonal().mean()
    normal_LL, z_L = gram_LL / scale + 1.0, torch.zeros(n, dtype=gram_LL.dtype)
    free_L = torch.zeros(n, dtype=torch.bool)
    barred_L = torch.zeros(n, dtype=torch.bool)  # those that rounding let in for no gain, until another step succeeds
    for _ in range(_STEPS + 10 * n):
        slope_L = (1.0 - normal_LL @ z_L).masked_fill(free_L | barred_L, -torch.inf)
        best = int(slope_L.argmax())
        if slope_L[best] <= _TOLERANCE * normal_LL.diagonal().max():
            return z_L / z_L.sum()
        free_L[best], entering = True, True
        while True:
            (at_f,) = free_L.nonzero(as_tuple=True)
            part_ff = normal_LL[at_f[:, None], at_f]
            wanted_f = torch.linalg.pinv(part_ff, hermitian=True) @ torch.ones(len(at_f), dtype=gram_LL.dtype)
            if entering and float(wanted_f[at_f == best]) <= 0:
                free_L[best], barred_L[best] = False, True
                break
            entering = False
            if bool((wanted_f > 0).all()):
                barred_L[:] = False
                z_L = torch.zeros_like(z_L).index_copy(0, at_f, wanted_f)
                break
            held_f, low_f = z_L[at_f], wanted_f <= 0
            way = (held_f[low_f] / (held_f[low_f] - wanted_f[low_f]).clamp_min(1e-300)).min()
            held_f = held_f + way * (wanted_f - held_f)
            held_f[low_f & (held_f <= held_f[low_f].min().clamp_min(0.0))] = 0.0
            z_L = torch.zeros_like(z_L).index_copy(0, at_f, held_f)
            free_L = z_L > 0
            if not bool(free_L.any()):
                break
    raise ValueError("the least norm was not found")


def nash_weights(gram_LL: Tensor) -> Tensor:
    """alpha [L] > 0 with alpha_i (K alpha)_i = 1, K divided by its norm: the Nash bargain of Nash-MTL (arXiv 2202.01017, claim 3.1).

    It is the minimum of alpha K alpha / 2 - sum log alpha, which is strictly convex and self-concordant: Newton's method with the step
    1 / (1 + lambda) stays inside and reaches it. Raises ValueError where there is none: directions that oppose each other so that no
    direction gains for all of them.
    """
    gram_LL = gram_LL / gram_LL.diagonal().max()
    gram_LL = gram_LL / torch.linalg.matrix_norm(gram_LL)
    length_L = gram_LL.diagonal().sqrt()
    gram_LL = gram_LL / torch.outer(length_L, length_L)
    alpha_L = torch.full_like(length_L, len(gram_LL) ** -0.5)
    for _ in range(_STEPS):
        slope_L = alpha_L * (gram_LL @ alpha_L) - 1.0  # in log alpha, where the Hessian is at least the identity
        curve_LL = alpha_L[:, None] * gram_LL * alpha_L + torch.eye(len(gram_LL), dtype=gram_LL.dtype)
        step_L = torch.linalg.solve(curve_LL, slope_L)
        decrement = (slope_L @ step_L).clamp_min(0.0).sqrt()
        alpha_L = alpha_L * (1.0 - step_L / (1.0 + decrement if decrement > 0.25 else 1.0))
        if decrement < 1e-10 or alpha_L.max() > _ENDLESS:
            break
    off = (alpha_L * (gram_LL @ alpha_L) - 1.0).abs().max()
    if not bool(off < 1e-6):
        raise ValueError("no direction gains for all languages")
    return alpha_L / length_L
