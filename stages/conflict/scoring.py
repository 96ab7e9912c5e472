"""Scores of all pairs, from a stream of sketches or of inner products. Formulas: `leave_out.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stages.conflict.directions import grams
from stages.conflict.leave_out import LeftOut, Scorer, rounding
from stages.conflict.scores import Scores
from stages.conflict.scratch import Kept
from stages.conflict.stream import BLOCK, Chunks, Columns, as_slice, blocks, check_finite, scaled_rows
from stages.conflict.surgery import Surgery

KEPT_BYTES = 2**30
"""Of sketches that wait in memory for those they leave with."""


def score_pairs(
    chunks: Chunks,
    language_N: Tensor,
    omega_N: Tensor,
    directions_LD: Tensor,
    method: Surgery,
    *,
    columns: Sequence[Columns] = (slice(None),),
    scale_D: Tensor | None = None,
    group_N: Tensor | None = None,
    refit: bool = False,
    min_pairs: int = 20,
    scratch_bytes: int = KEPT_BYTES,
    scratch_folder: Path | None = None,
    kept: Kept | None = None,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Scores:
    """Score every pair of the stream the directions were made from (same g_i, same order, same omegas).

    scale_D: g_i is scale_D times the stream's rows; None: the rows. columns: the S segments of sketch columns that get their own surgery; they partition D. group_N [N] int64: pairs
    with equal labels leave together (see `merge_groups`); None: each pair leaves alone. refit=False keeps w at its
    value from all pairs; True solves for w again on every K', with the same random orders.

    kept: the rows that an earlier pass over the stream put aside, by the labels that count then; only if it is not
    `complete` the stream is read again. None: a pass here puts them aside, in memory of at most `scratch_bytes` or a
    temporary file in `scratch_folder`. advance: is told of pairs that are scored without being read. Raises UserError when there is no room.
    """
    n, n_languages = language_N.shape[0], directions_LD.shape[0]
    if kept is None:
        with Kept(torch.arange(n) if group_N is None else group_N, scratch_bytes, scratch_folder) as found:
            for block in blocks(chunks):
                found.put(block)
            return score_pairs(
                chunks,
                language_N,
                omega_N,
                directions_LD,
                method,
                columns=columns,
                scale_D=scale_D,
                refit=refit,
                min_pairs=min_pairs,
                kept=found,
                advance=advance,
            )
    products = _Products(directions_LD, columns, scale_D)
    count_L = torch.bincount(language_N, minlength=n_languages)
    scorer = Scorer(language_N, omega_N, products.gram_SLL, method, count_L, refit, min_pairs)
    scores = Scores.empty(n, n_languages)
    for block in () if kept.complete else blocks(chunks):
        (alone_m,) = (kept.layout.slot_N[block.start : block.stop] < 0).nonzero(as_tuple=True)
        for few_n in scorer.cut(alone_m):
            index_n1 = block.start + few_n[:, None]
            x_nD = products.rows(block.x_ND if len(few_n) == len(block.x_ND) else block.x_ND[few_n])
            a_nSL, p_nmmS = products(x_nD[:, None], block.factor_N[few_n, None])
            check_finite(p_nmmS, block)
            scorer.write(scores, index_n1, scorer.leave(index_n1, a_nSL, p_nmmS, rounding(x_nD.dtype)))
    for start, index_gm in kept.layout.batches(min(BLOCK, scorer.at_once)):
        if index_gm.shape[1] > BLOCK:
            _score_large(scores, scorer, products, kept, start, index_gm[0])
        else:
            x_gmD = products.rows(kept.get(start, start + index_gm.numel())).view(*index_gm.shape, -1)
            a_gmSL, p_gmmS = products(x_gmD, kept.factor_N[index_gm])
            scorer.write(scores, index_gm, scorer.leave(index_gm, a_gmSL, p_gmmS, rounding(x_gmD.dtype)))
        if kept.complete:
            advance(index_gm.numel())
    return scores


def score_products(
    chunks: Iterable[tuple[Tensor, Tensor]],
    language_N: Tensor,
    omega_N: Tensor,
    gram_SLL: Tensor,
    method: Surgery,
    *,
    count_L: Tensor,
    refit: bool = False,
    min_pairs: int = 20,
) -> Scores:
    """`score_pairs` with every pair leaving alone, from a stream of inner products instead of sketches.

    chunks: (<g_i, G_k> [n, S, L], |g_i|^2 [n, S]) of consecutive pairs; gram_SLL = <G_l, G_k>; count_L: pairs in each
    direction. Raises ValueError when the stream and `language_N` differ in length.
    """
    scorer = Scorer(language_N, omega_N, gram_SLL, method, count_L, refit, min_pairs)
    scores = Scores.empty(language_N.shape[0], gram_SLL.shape[-1])
    start, total = 0, language_N.shape[0]
    for a_nSL, square_nS in chunks:
        for few_n in scorer.cut(torch.arange(min(len(a_nSL), total - start))):
            index_n1 = start + few_n[:, None]
            left = scorer.leave(index_n1, a_nSL[few_n, None], square_nS[few_n, None, None], rounding(a_nSL.dtype))
            scorer.write(scores, index_n1, left)
        start += len(a_nSL)
    if start != total:
        raise ValueError(f"the stream has {start} or more rows for {total} pairs")
    return scores


class _Products:
    """Inner products of pairs with the directions and with each other, per segment."""

    def __init__(self, directions_LD: Tensor, columns: Sequence[Columns], scale_D: Tensor | None) -> None:
        self.columns = [as_slice(c) for c in columns]
        self.directions_LD, self.scale_D = directions_LD, scale_D
        self.gram_SLL = grams(directions_LD, self.columns)

    def rows(self, x_ND: Tensor) -> Tensor:
        """Rows as the directions are scaled."""
        return scaled_rows(x_ND, self.scale_D)

    def __call__(self, x_gmD: Tensor, factor_gm: Tensor) -> tuple[Tensor, Tensor]:
        """(<g_i, G_k> [g, m, S, L], <g_i, g_j> [g, m, m, S]) float64 of g = factor * x, in the precision of x."""
        parts = [x_gmD[..., c] for c in self.columns]
        a_gmSL = torch.stack([self._along(part, c) for part, c in zip(parts, self.columns, strict=True)], dim=2)
        if x_gmD.shape[1] == 1:
            inner_gmmS = torch.stack([torch.linalg.vector_norm(part, dim=-1).square() for part in parts], -1)[
                :, :, None
            ]
        else:
            inner_gmmS = torch.stack([torch.bmm(part, part.mT) for part in parts], dim=-1)
        factor_gm = factor_gm.to(torch.float64)
        outer_gmm = factor_gm[:, :, None] * factor_gm[:, None, :]
        return a_gmSL.to(torch.float64) * factor_gm[..., None, None], inner_gmmS.to(torch.float64) * outer_gmm[
            ..., None
        ]

    def _along(self, part: Tensor, columns: Columns) -> Tensor:
        return part @ self.directions_LD[:, columns].to(part.dtype).T


def _score_large(
    scores: Scores,
    scorer: Scorer,
    products: _Products,
    kept: Kept,
    start: int,
    index_m: Tensor,
) -> None:
    """A group too large to hold: sum what leaves first, then go through its pairs again."""
    removed_LD = torch.zeros_like(products.directions_LD)
    for at in range(0, len(index_m), BLOCK):
        here = index_m[at : at + BLOCK]
        x_nD = products.rows(kept.get(start + at, start + at + len(here)))
        part_nL = scorer.parts(here[None])[0] * kept.factor_N[here, None]
        removed_LD += part_nL.to(x_nD.dtype).T @ x_nD
    pairs_of_columns = [(removed_LD[:, c], products.directions_LD[:, c]) for c in products.columns]
    cross_SLL = torch.stack([removed @ direction.T for removed, direction in pairs_of_columns])
    omega_L = scorer.parts(index_m[None])[0].sum(dim=0)
    count_L = torch.bincount(scorer.language_N[index_m], minlength=len(omega_L))
    beside = _Products(removed_LD, products.columns, products.scale_D)
    for at in range(0, len(index_m), BLOCK):
        here = index_m[at : at + BLOCK]
        x_nD = products.rows(kept.get(start + at, start + at + len(here)))
        a_nSL, square_nmmS = products(x_nD[:, None], kept.factor_N[here, None])
        removed_nSL, _ = beside(x_nD[:, None], kept.factor_N[here, None])
        shared = (omega_L[None], count_L[None], cross_SLL[None], beside.gram_SLL[None], rounding(x_nD.dtype))
        left = LeftOut(a_nSL.transpose(0, 1), square_nmmS[:, 0].transpose(0, 1), removed_nSL.transpose(0, 1), *shared)
        scorer.write(scores, here[None], left)
