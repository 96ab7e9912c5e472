"""PCGrad in coefficient space (arXiv 2001.06782, algorithm 1): on inner products alone, all orders at once.

C starts as the identity. For direction i, and j != i in its order: s = (C_i K)_j is the running direction's product with the ORIGINAL G_j;
where s < 0 and |G_j| > 0, C_ij -= s / K_jj. The weights are the column sums of C. The pairs (order, i) are rows that do not meet, so that
step t of all of them is one operation; a row without a negative product at its start never changes and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_STEPS = 8
"""Steps of a row in a block: among themselves their products are kept up to date one by one, the others learn of the block's at its end."""
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
    inverse_BL = torch.where(solid_BL, 1.0 / torch.where(solid_BL, length_BL, 1.0), 0.0)
    clashes_BLL = (gram_BLL < 0) & solid_BL[:, None] & ~torch.eye(n, dtype=torch.bool)
    matrix_m, start_m = clashes_BLL.any(dim=-1).nonzero(as_tuple=True)
    row_m = (torch.arange(len(order_RLL))[:, None] * len(matrix_m) + torch.arange(len(matrix_m))).flatten()
    added_BL = torch.zeros(gram_BLL.shape[:2], dtype=torch.float64)
    for few_n in row_m.split(max(1, _NUMBERS // (n + _STEPS * min(n, _STEPS)))):
        order_n, clash_n = few_n // len(matrix_m), few_n % len(matrix_m)
        matrix_n, start_n = matrix_m[clash_n], start_m[clash_n]
        added_nL = _meet(gram_BLL, inverse_BL, matrix_n, start_n, order_RLL[order_n, start_n].long())
        added_BL.index_add_(0, matrix_n, added_nL.to(torch.float64))
    return (1.0 + added_BL / len(order_RLL)).view(gram.shape[:-1])


def _meet(gram_BLL: Tensor, inverse_BL: Tensor, matrix_n: Tensor, start_n: Tensor, order_nL: Tensor) -> Tensor:
    """What rows add to the weights [n, L]: row k is direction start_n[k] of matrix matrix_n[k], meeting others in order_nL[k]."""
    n_languages = gram_BLL.shape[-1]
    gram_ML = gram_BLL.flatten(0, 1)  # all directions of all matrices
    first_n1 = (matrix_n * n_languages)[:, None]
    product_nL = gram_ML[first_n1[:, 0] + start_n]  # C_i K
    added_nL = torch.zeros_like(product_nL)
    for met_nT in order_nL.split(_STEPS, dim=1):
        at_nT = first_n1 + met_nT
        inverse_nT = inverse_BL.flatten()[at_nT].masked_fill_(met_nT == start_n[:, None], 0.0)
        step_nT = _block(gram_ML, product_nL.gather(1, met_nT), inverse_nT, at_nT * n_languages, met_nT)
        added_nL.scatter_(1, met_nT, step_nT)
        moved_nT = step_nT > 0
        if met_nT.shape[1] < n_languages and bool(moved_nT.any()):
            begins_n = moved_nT.sum(dim=1).cumsum(0).roll(1)
            begins_n[0] = 0
            product_nL += embedding_bag(
                at_nT[moved_nT], gram_ML, begins_n, mode="sum", per_sample_weights=step_nT[moved_nT]
            )
    return added_nL


def _block(gram_ML: Tensor, product_nT: Tensor, inverse_nT: Tensor, at_nT: Tensor, met_nT: Tensor) -> Tensor:
    """What each step of a block adds to C [n, T]: -s / K_jj where s < 0. at_nT: where the rows of K that are met begin."""
    among_nTT = gram_ML.take(at_nT[:, :, None] + met_nT[:, None, :])
    step_nT = torch.zeros_like(product_nT)
    for t in range(met_nT.shape[1]):
        step_n = torch.mul(product_nT[:, t].clamp_max(0.0), inverse_nT[:, t], out=step_nT[:, t]).neg_()
        product_nT[:, t + 1 :].addcmul_(step_n[:, None], among_nTT[:, t, t + 1 :])
    return step_nT
