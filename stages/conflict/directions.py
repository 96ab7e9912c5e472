"""Language directions G_l = sum_i omega_i g_i from a stream of pair gradients.

g_i is c_i d_i (`weighting = loss`, the gradient of the loss up to beta: `stages/gradients/weights.py`) or d_i (`none`); omega
is the mean's or an EMA's (`stages/gradients/omegas.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.conflict.stream import Block, Chunks, Columns, blocks, check_finite, wide


def directions(chunks: Chunks, language_N: Tensor, omega_N: Tensor, n_languages: int) -> Tensor:
    """G [L, D], float64, in one pass. Raises ValueError for entries that are not finite, with the row, and when the
    stream and `language_N` differ in length.
    """
    return signed_directions(chunks, language_N, omega_N, n_languages)[0]


def signed_directions(
    chunks: Chunks,
    language_N: Tensor,
    omega_N: Tensor,
    n_languages: int,
    sign_RN: Tensor | None = None,
    scale_D: Tensor | None = None,
    keep: Callable[[Block], None] = lambda block: None,
) -> tuple[Tensor, Tensor | None]:
    """(G [L, D] float64, sum_i sign_ri omega_i g_i per language [R, L, D] in the rows' precision), in one pass.

    sign_RN: R factors per pair (signs, or 0 and 1), for nulls; None: no second result. scale_D: g_i is scale_D times the
    stream's rows, so that the sums are scaled; None: the rows. keep: is shown every block.
    Memory: R x L x D numbers.
    Raises ValueError as `directions` does.
    """
    total_LD: Tensor | None = None
    signed_LRD: Tensor | None = None
    seen = 0
    for block in blocks(chunks):
        seen = block.stop
        if seen > len(language_N):
            break
        keep(block)
        x_ND, here = wide(block.x_ND), slice(block.start, block.stop)
        language_n, weight_n = language_N[here], (omega_N[here] * block.factor_N)
        if total_LD is None:
            total_LD = torch.zeros(n_languages, x_ND.shape[1], dtype=torch.float64)
            if sign_RN is not None:
                signed_LRD = torch.zeros(n_languages, len(sign_RN), x_ND.shape[1], dtype=x_ND.dtype)
        spread_Ln = torch.zeros(n_languages, len(x_ND), dtype=x_ND.dtype)
        spread_Ln[language_n, torch.arange(len(x_ND))] = weight_n.to(x_ND.dtype)
        part_LD = spread_Ln @ x_ND
        check_finite(part_LD, block)
        total_LD += part_LD
        if signed_LRD is None or sign_RN is None:
            continue
        signs_Rn = sign_RN[:, here].to(x_ND.dtype) * weight_n.to(x_ND.dtype)
        for language in language_n.unique().tolist():
            (mine_m,) = (language_n == language).nonzero(as_tuple=True)
            whole = len(mine_m) == len(x_ND)
            signed_LRD[language].addmm_(*((signs_Rn, x_ND) if whole else (signs_Rn[:, mine_m], x_ND[mine_m])))
    if total_LD is None or seen != len(language_N):
        raise ValueError(f"the stream has {seen} or more rows for {len(language_N)} pairs")
    if scale_D is not None:
        total_LD *= scale_D
        if signed_LRD is not None:
            signed_LRD *= scale_D.to(signed_LRD.dtype)
    return total_LD, None if signed_LRD is None else signed_LRD.transpose(0, 1)


def grams(directions_LD: Tensor, columns: Sequence[Columns]) -> Tensor:
    """Gram matrices K [S, L, L], K_lk = <G_l, G_k> over each segment's columns (they partition D)."""
    return torch.stack([directions_LD[:, c] @ directions_LD[:, c].T for c in columns])


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine [..., L, L], valid) of a Gram matrix; 0 and False where a direction has no length."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    product = norm[..., :, None] * norm[..., None, :]
    valid = product > 0
    return torch.where(valid, gram / torch.where(valid, product, 1.0), 0.0).clamp(-1.0, 1.0), valid


def conflicts(gram_LL: Tensor) -> int:
    """Number of unordered language pairs with K_lk < 0."""
    return int((gram_LL.triu(1) < 0).sum())
