"""Language directions G_l = sum_i omega_i g_i from a stream of pair gradients.

g_i is c_i d_i (`weighting = loss`, the gradient of the loss up to beta: `stages/gradients/weights.py`) or d_i (`none`); omega
is the mean's or an EMA's (`stages/gradients/omegas.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.conflict.stream import BLOCK, Block, Chunks, Columns, blocks, check_finite, widened

_AT_ONCE = 8
"""Blocks that are summed together: where languages take turns in the stream each has more rows in them, and sums are opened less often."""


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
    sign_Rn: Tensor | None = None,
    rows_n: Tensor | None = None,
    scale_D: Tensor | None = None,
    keep: Callable[[Block], None] = lambda block: None,
) -> tuple[Tensor, Tensor | None]:
    """(G [L, D] float64, sum_i sign_ri omega_i g_i per language [R, L, D] in the rows' precision), in one pass, on the CPU.

    sign_Rn: R factors (signs, or 0 and 1) of the pairs rows_n [n], ascending (None: of all pairs), for nulls; None: no second result.
    scale_D: g_i is scale_D times the stream's rows, so that the sums are scaled; None: the rows. keep: is shown every block.
    Sums are made where the stream's rows are. Memory: (R + 1) x L x D numbers.
    Raises ValueError as `directions` does.
    """
    sums: _Sums | None = None
    seen = 0
    for block in blocks(chunks, _AT_ONCE):
        seen = block.stop
        if seen > len(language_N):
            break
        keep(block)
        if sums is None:
            sums = _Sums(n_languages, 0 if sign_Rn is None else len(sign_Rn), widened(block.x_ND[:0]))
        here = slice(block.start, block.stop)
        signs_Rm, place_n = None, torch.arange(len(block.x_ND))
        if sign_Rn is not None and rows_n is None:
            signs_Rm = sign_Rn[:, here]
        elif sign_Rn is not None and rows_n is not None:
            first, last = torch.searchsorted(rows_n, torch.tensor([block.start, block.stop])).tolist()
            signs_Rm, place_n = sign_Rn[:, first:last], torch.full_like(place_n, -1)
            place_n[rows_n[first:last] - block.start] = torch.arange(last - first)
        sums.add(block, language_N[here], omega_N[here] * block.factor_N, signs_Rm, place_n)
    if sums is None or seen != len(language_N):
        raise ValueError(f"the stream has {seen} or more rows for {len(language_N)} pairs")
    total_LD, signed_LRD = sums.totals()
    if scale_D is not None:
        total_LD *= scale_D
        if signed_LRD is not None:
            signed_LRD *= scale_D.to(signed_LRD.dtype)
    return total_LD, None if signed_LRD is None else signed_LRD.transpose(0, 1)


class _Sums:
    """Weighted sums of rows by language while blocks come in; `signs` more of them, in the rows' precision throughout."""

    def __init__(self, n_languages: int, signs: int, like: Tensor) -> None:
        dim, self._dtype = like.shape[1], like.dtype
        self._total_LD = torch.zeros(n_languages, dim, dtype=torch.float64, device=like.device)
        self._signed_LRD = like.new_zeros(n_languages, signs, dim) if signs else None

    def add(self, block: Block, language_n: Tensor, weight_n: Tensor, sign_Rm: Tensor | None, place_n: Tensor) -> None:
        """Add a block's rows, with R more factors each: those of row i are sign_Rm[:, place_n[i]], or it has none where that is -1.
        Raises ValueError for rows that are not finite."""
        order_n = language_n.argsort(stable=True)
        present, counts = language_n[order_n].unique_consecutive(return_counts=True)
        for language, mine_n in zip(present.tolist(), order_n.split(counts.tolist()), strict=True):
            part_D = torch.zeros_like(self._total_LD[language], dtype=self._dtype)
            for few_n in mine_n.split(BLOCK):
                x_nD = widened(_rows(block.x_ND, few_n))
                weight_few = weight_n[few_n].to(x_nD)
                part_D += weight_few @ x_nD
                if sign_Rm is not None and self._signed_LRD is not None:
                    at_m, x_mD, weight_m = place_n[few_n], x_nD, weight_few
                    (on_m,) = (at_m >= 0).nonzero(as_tuple=True)
                    if len(on_m) < len(at_m):
                        there_m = on_m.to(x_nD.device)
                        at_m, x_mD, weight_m = at_m[on_m], x_nD[there_m], weight_few[there_m]
                    if len(at_m):
                        self._signed_LRD[language].addmm_(sign_Rm[:, at_m].to(x_mD) * weight_m, x_mD)
            self._total_LD[language] += part_D
        check_finite(self._total_LD[present.to(self._total_LD.device)], block)

    def totals(self) -> tuple[Tensor, Tensor | None]:
        """(sums [L, D] float64, signed sums [L, R, D]) on the CPU."""
        return self._total_LD.cpu(), None if self._signed_LRD is None else self._signed_LRD.cpu()


def _rows(x_ND: Tensor, at_n: Tensor) -> Tensor:
    """Rows at ascending places; those that follow each other are not copied."""
    first, stop = int(at_n[0]), int(at_n[-1]) + 1
    return x_ND[first:stop] if stop - first == len(at_n) else x_ND[at_n.to(x_ND.device)]


def grams(directions_LD: Tensor, columns: Sequence[Columns]) -> Tensor:
    """Gram matrices K [S, L, L], K_lk = <G_l, G_k> over each segment's columns (they partition D)."""
    return torch.stack([directions_LD[:, c] @ directions_LD[:, c].T for c in columns])


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine [..., L, L], valid) of a Gram matrix; 0 and False where a direction has no length."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    product = norm[..., :, None] * norm[..., None, :]
    valid = product > 0
    return torch.where(valid, gram / torch.where(valid, product, 1.0), 0.0).clamp(-1.0, 1.0), valid


def count_conflicts(gram_LL: Tensor) -> int:
    """Number of unordered language pairs with K_lk < 0."""
    return int((gram_LL.triu(1) < 0).sum())
