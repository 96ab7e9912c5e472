"""PCGrad in coefficient space (arXiv 2001.06782, algorithm 1): on inner products alone, all orders at once.

C starts as the identity. For direction i, and j != i in its order: s = (C_i K)_j is the running direction's product with the ORIGINAL G_j;
where s < 0 and |G_j| > 0, C_ij -= s / K_jj. The weights are the column sums of C. The pairs (order, i) are rows that do not meet, so that
step t of all of them is one operation; a row without a negative product at its start never changes and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 96
"""Steps of a row whose products are kept up to date one by one; the others learn of a block's changes by one matrix product."""
_MANY = 256
"""From here on products are float32: a weight is right to about 1e-5, since it moves with s and s is zero where a clash begins."""
_NUMBERS = 4_000_000
"""In a chunk of rows, so that it stays near the cores."""


def draw_orders(n_languages: int, repeats: int, seed: int) -> Tensor:
    """Random orders [R, L, L] int32: orders[r, i] is the order in which direction i meets the others in repeat r."""
    if repeats < 1:
        raise ValueError(f"PCGrad needs at least one order, got {repeats}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = [torch.randperm(n_languages, generator=generator).int() for _ in range(repeats * n_languages)]
    return torch.stack(rows).view(repeats, n_languages, n_languages)


def pcgrad_weights(gram: Tensor, order_RLL: Tensor) -> Tensor:
    """Weights [..., L] of K [..., L, L], averaged over R orders. Every weight is >= 1; 1 where no two directions conflict."""
    n = gram.shape[-1]
    gram_BLL = gram.reshape(-1, n, n).to(torch.float64 if n < _MANY else torch.float32)
    length_BL = gram_BLL.diagonal(dim1=-2, dim2=-1)
    solid_BL = length_BL > 0
    clashes_BLL = (gram_BLL < 0) & solid_BL[:, None] & ~torch.eye(n, dtype=torch.bool)
    matrix_m, start_m = clashes_BLL.any(dim=-1).nonzero(as_tuple=True)
    added_BL = torch.zeros(gram_BLL.shape[:2], dtype=torch.float64)
    inverse_BL = torch.where(solid_BL, 1.0 / torch.where(solid_BL, length_BL, 1.0), 0.0)
    for order_LL in order_RLL:
        for few_m in torch.arange(len(matrix_m)).split(max(1, _NUMBERS // n)):
            matrix_n, start_n = matrix_m[few_m], start_m[few_m]
            added_nL = _one_order(gram_BLL, inverse_BL, matrix_n, start_n, order_LL[start_n].long())
            added_BL.index_add_(0, matrix_n, added_nL.to(torch.float64))
    return (1.0 + added_BL / len(order_RLL)).view(gram.shape[:-1])


def _one_order(gram_BLL: Tensor, inverse_BL: Tensor, matrix_n: Tensor, start_n: Tensor, order_nL: Tensor) -> Tensor:
    """What rows add to the weights [n, L]: row k is direction start_n[k] of matrix matrix_n[k], meeting others in order_nL[k]."""
    n_languages = gram_BLL.shape[-1]
    flat, base_n = gram_BLL.flatten(), matrix_n * n_languages * n_languages
    product_nL = gram_BLL[matrix_n, start_n]  # C_i K
    added_nL = torch.zeros_like(product_nL)
    for first in range(0, n_languages, _STEPS):
        met_nT = order_nL[:, first : first + _STEPS]
        product_nT = product_nL.gather(1, met_nT)
        inverse_nT = inverse_BL[matrix_n[:, None], met_nT].masked_fill_(met_nT == start_n[:, None], 0.0)
        step_nT = torch.zeros_like(product_nT)
        for t in range(met_nT.shape[1]):
            step_n = product_nT[:, t].clamp_max(0.0) * inverse_nT[:, t]
            (clash_c,) = (step_n < 0).nonzero(as_tuple=True)
            if not len(clash_c):
                continue
            step_nT[:, t] = -step_n
            if t + 1 < met_nT.shape[1]:
                at_c1 = (base_n[clash_c] + met_nT[clash_c, t] * n_languages)[:, None]
                later_cT = flat[at_c1 + met_nT[clash_c, t + 1 :]]
                product_nT[clash_c, t + 1 :] -= step_n[clash_c, None] * later_cT
        new_nL = torch.zeros_like(product_nL).scatter_(1, met_nT, step_nT)
        added_nL += new_nL
        if first + _STEPS < n_languages:
            product_nL = _after(gram_BLL, matrix_n, product_nL, new_nL)
    return added_nL


def _after(gram_BLL: Tensor, matrix_n: Tensor, product_nL: Tensor, new_nL: Tensor) -> Tensor:
    """C_i K after C_i changed by new_nL."""
    if len(gram_BLL) == 1:
        return torch.addmm(product_nL, new_nL, gram_BLL[0])
    found_nL = product_nL.clone()
    for matrix in matrix_n.unique().tolist():
        mine_m = (matrix_n == matrix).nonzero()[:, 0]
        found_nL[mine_m] += new_nL[mine_m] @ gram_BLL[matrix]
    return found_nL
