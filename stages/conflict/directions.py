"""Language directions G_l = sum_i omega_i g_i from a stream of pair gradients.

g_i is c_i d_i (`weighting = loss`, the gradient of the loss up to beta: `stages/gradients/weights.py`) or d_i (`none`); omega
is the mean's or an EMA's (`stages/gradients/omegas.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.conflict.stream import Block, Chunks, Columns, blocks, check_finite, widened

_FLUSH = 8
"""Blocks whose sums are added in the rows' precision before they join the float64 totals."""
_ONE_PRODUCT = 24
"""Languages in a block up to which one product sums all of them; more are gathered one by one, at the cost of a copy."""


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
    for block in blocks(chunks):
        seen = block.stop
        if seen > len(language_N):
            break
        keep(block)
        x_ND, here = widened(block.x_ND), slice(block.start, block.stop)
        if sums is None:
            sums = _Sums(n_languages, 0 if sign_Rn is None else len(sign_Rn), x_ND)
        weight_n = (omega_N[here] * block.factor_N).to(x_ND.dtype).to(x_ND.device)
        language_n = language_N[here]
        check_finite(sums.add(language_n, weight_n, x_ND), block)
        if sign_Rn is None:
            continue
        if rows_n is None:
            sums.add_signed(language_n, weight_n * sign_Rn[:, here].to(weight_n), x_ND)
            continue
        first, last = torch.searchsorted(rows_n, torch.tensor([block.start, block.stop])).tolist()
        if first < last:
            at_n = rows_n[first:last] - block.start
            signs_Rn = sign_Rn[:, first:last].to(weight_n) * weight_n[at_n.to(weight_n.device)]
            sums.add_signed(language_n[at_n], signs_Rn, x_ND[at_n.to(x_ND.device)])
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
        dim = like.shape[1]
        self._total_LD = torch.zeros(n_languages, dim, dtype=torch.float64, device=like.device)
        self._some_LD = torch.zeros(n_languages, dim, dtype=like.dtype, device=like.device)
        self._signed_LRD = like.new_zeros(n_languages, signs, dim) if signs else None
        self._blocks = 0

    def add(self, language_n: Tensor, weight_n: Tensor, x_nD: Tensor) -> Tensor:
        """Add rows; returns the languages' sums that they went into."""
        if self._blocks == _FLUSH:
            self._flush()
        self._blocks += 1
        present = language_n.unique()
        if len(present) <= _ONE_PRODUCT:
            at_n = torch.searchsorted(present, language_n).to(x_nD.device)
            spread_Ln = x_nD.new_zeros(len(present), len(x_nD))
            spread_Ln[at_n, torch.arange(len(x_nD), device=x_nD.device)] = weight_n
            part_LD = spread_Ln @ x_nD
            self._some_LD[present.to(x_nD.device)] += part_LD
            return part_LD
        for language in present.tolist():
            mine_m = (language_n == language).nonzero()[:, 0].to(x_nD.device)
            self._some_LD[language] += weight_n[mine_m] @ x_nD[mine_m]
        return self._some_LD

    def add_signed(self, language_n: Tensor, sign_Rn: Tensor, x_nD: Tensor) -> None:
        """Add rows, each with R factors."""
        assert self._signed_LRD is not None
        for language in language_n.unique().tolist():
            mine_m = (language_n == language).nonzero()[:, 0].to(x_nD.device)
            whole = len(mine_m) == len(x_nD)
            self._signed_LRD[language].addmm_(*((sign_Rn, x_nD) if whole else (sign_Rn[:, mine_m], x_nD[mine_m])))

    def totals(self) -> tuple[Tensor, Tensor | None]:
        """(sums [L, D] float64, signed sums [L, R, D]) on the CPU."""
        self._flush()
        return self._total_LD.cpu(), None if self._signed_LRD is None else self._signed_LRD.cpu()

    def _flush(self) -> None:
        self._total_LD += self._some_LD
        self._some_LD.zero_()
        self._blocks = 0


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
