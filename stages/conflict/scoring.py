"""Scores of all pairs, from a stream of sketches or of inner products. Formulas: `leave_out.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from stages.conflict.directions import grams
from stages.conflict.leave_out import LeaveOut, Scored, rounding
from stages.conflict.scores import PairScores
from stages.conflict.stream import BLOCK, Chunks, Columns, as_slice, blocks, check_finite, scaled_rows
from stages.conflict.waiting import Waiting
from stages.surgery.methods import Surgery

WAITING_BYTES = 2**29
"""Of sketches that wait in memory for those they leave with."""


def score_sketches(
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
    count_L: Tensor | None = None,
    waiting_bytes: int = WAITING_BYTES,
    scratch_folder: Path | None = None,
    waiting: Waiting | None = None,
    advance: Callable[[int], None] = lambda pairs: None,
) -> PairScores:
    """Score every pair of the stream the directions were made from (same g_i, same order, same omegas).

    scale_D: g_i is scale_D times the stream's rows; None: the rows. columns: the S segments of sketch columns that get their own surgery; they
    partition D. group_N [N] int64: pairs with equal labels leave together (see `merge_groups`); None: each pair leaves alone. refit=False keeps
    w at its value from all pairs; True solves for w again on every K', with the same random orders. count_L: pairs in each direction; None: all of
    the language. Pairs with omega 0 are in none.

    waiting: the rows that an earlier pass over the stream put aside, by the labels that count then; only if it is not
    `complete` the stream is read again. None: a pass here puts them aside, in memory of at most `waiting_bytes` or a
    temporary file in `scratch_folder`. advance: is told of pairs that are scored without being read. Close the result. Raises UserError when
    there is no room.
    """
    n, n_languages = language_N.shape[0], directions_LD.shape[0]
    if waiting is None:
        labels_N = torch.arange(n) if group_N is None else group_N
        with closing(Waiting(labels_N, waiting_bytes, scratch_folder)) as put_aside:
            for block in blocks(chunks):
                put_aside.put(block)
            return score_sketches(
                chunks,
                language_N,
                omega_N,
                directions_LD,
                method,
                columns=columns,
                scale_D=scale_D,
                refit=refit,
                count_L=count_L,
                scratch_folder=scratch_folder,
                waiting=put_aside,
                advance=advance,
            )
    products = _InnerProducts(directions_LD, columns, scale_D)
    if count_L is None:
        count_L = torch.bincount(language_N, minlength=n_languages)
    leave_out = LeaveOut(language_N, omega_N, products.gram_SLL, method, count_L, refit)
    scores = PairScores(n, n_languages, scratch_folder)
    for block in () if waiting.complete else blocks(chunks):
        (alone_m,) = (waiting.layout.slot_N[block.start : block.stop] < 0).nonzero(as_tuple=True)
        for few_n in leave_out.cut(alone_m):
            index_n1 = block.start + few_n[:, None]
            whole = len(few_n) == len(block.x_ND)
            x_nD = products.rows(block.x_ND if whole else block.x_ND[few_n.to(block.x_ND.device)])
            a_nSL, p_nmmS = products(x_nD[:, None], block.factor_N[few_n, None])
            check_finite(p_nmmS, block)
            leave_out.score(scores, index_n1, a_nSL, p_nmmS, rounding(x_nD.dtype))
    for start, index_gm in waiting.layout.batches(min(BLOCK, leave_out.at_once)):
        if index_gm.shape[1] > BLOCK:
            _score_large(scores, leave_out, products, waiting, start, index_gm[0])
        else:
            x_gmD = products.rows(waiting.get(start, start + index_gm.numel())).view(*index_gm.shape, -1)
            a_gmSL, p_gmmS = products(x_gmD, waiting.factor_N[index_gm])
            leave_out.score(scores, index_gm, a_gmSL, p_gmmS, rounding(x_gmD.dtype))
        if waiting.complete:
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
    scratch_folder: Path | None = None,
) -> PairScores:
    """`score_sketches` with every pair leaving alone, from a stream of inner products instead of sketches.

    chunks: (<g_i, G_k> [n, S, L], |g_i|^2 [n, S]) of consecutive pairs; gram_SLL = <G_l, G_k>; count_L: pairs in each
    direction. Raises ValueError when the stream and `language_N` differ in length.
    """
    leave_out = LeaveOut(language_N, omega_N, gram_SLL, method, count_L, refit)
    scores = PairScores(language_N.shape[0], gram_SLL.shape[-1], scratch_folder)
    start, total = 0, language_N.shape[0]
    for a_nSL, square_nS in chunks:
        for few_n in leave_out.cut(torch.arange(min(len(a_nSL), total - start))):
            index_n1 = start + few_n[:, None]
            square_nmmS = square_nS[few_n, None, None]
            leave_out.score(scores, index_n1, a_nSL[few_n, None], square_nmmS, rounding(a_nSL.dtype))
        start += len(a_nSL)
    if start != total:
        raise ValueError(f"the stream has {start} or more rows for {total} pairs")
    return scores


class _InnerProducts:
    """Inner products of pairs with the directions and with each other, per segment, made where the rows are."""

    def __init__(self, directions_LD: Tensor, columns: Sequence[Columns], scale_D: Tensor | None) -> None:
        self.columns = [as_slice(c) for c in columns]
        self.directions_LD, self.scale_D = directions_LD, scale_D
        self.gram_SLL = grams(directions_LD, self.columns)
        self._parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def rows(self, x_ND: Tensor) -> Tensor:
        """Rows as the directions are scaled."""
        return scaled_rows(x_ND, self.scale_D)

    def __call__(self, x_gmD: Tensor, factor_gm: Tensor) -> tuple[Tensor, Tensor]:
        """(<g_i, G_k> [g, m, S, L], <g_i, g_j> [g, m, m, S]) float64 on the CPU of g = factor * x, in the precision of x."""
        parts = [x_gmD[..., c] for c in self.columns]
        a_gmSL = torch.stack([part @ d_LD.T for part, d_LD in zip(parts, self._directions(x_gmD), strict=True)], dim=2)
        if x_gmD.shape[1] == 1:
            inner_gmmS = torch.stack([torch.linalg.vector_norm(part, dim=-1).square() for part in parts], -1)[
                :, :, None
            ]
        else:
            inner_gmmS = torch.stack([torch.bmm(part, part.mT) for part in parts], dim=-1)
        factor_gm = factor_gm.to(torch.float64)
        outer_gmm = factor_gm[:, :, None] * factor_gm[:, None, :]
        a_gmSL, inner_gmmS = a_gmSL.cpu().to(torch.float64), inner_gmmS.cpu().to(torch.float64)
        return a_gmSL * factor_gm[..., None, None], inner_gmmS * outer_gmm[..., None]

    def _directions(self, like: Tensor) -> list[Tensor]:
        key = (like.dtype, like.device)
        if key not in self._parts:
            self._parts[key] = [self.directions_LD[:, c].to(like.device, like.dtype) for c in self.columns]
        return self._parts[key]


def _score_large(
    scores: PairScores,
    leave_out: LeaveOut,
    products: _InnerProducts,
    waiting: Waiting,
    start: int,
    index_m: Tensor,
) -> None:
    """A group too large to hold: sum what leaves first, then go through its pairs again."""
    removed_LD = torch.zeros_like(products.directions_LD)
    for at in range(0, len(index_m), BLOCK):
        here = index_m[at : at + BLOCK]
        x_nD = products.rows(waiting.get(start + at, start + at + len(here)))
        part_nL = torch.zeros(len(here), len(removed_LD), dtype=torch.float64)
        part_n = leave_out.omega_N[here] * waiting.factor_N[here]
        part_nL.scatter_(1, leave_out.language_N[here, None], part_n[:, None])
        removed_LD += (part_nL.to(x_nD.device, x_nD.dtype).T @ x_nD).cpu()
    pairs_of_columns = [(removed_LD[:, c], products.directions_LD[:, c]) for c in products.columns]
    cross_SLL = torch.stack([removed @ direction.T for removed, direction in pairs_of_columns])
    beside = _InnerProducts(removed_LD, products.columns, products.scale_D)
    leavers = leave_out.summed(index_m, cross_SLL, beside.gram_SLL)
    for at in range(0, len(index_m), BLOCK):
        here = index_m[at : at + BLOCK]
        x_nD = products.rows(waiting.get(start + at, start + at + len(here)))
        a_nSL, square_nmmS = products(x_nD[:, None], waiting.factor_N[here, None])
        removed_nSL, _ = beside(x_nD[:, None], waiting.factor_N[here, None])
        leave_out.write(
            scores,
            leavers,
            Scored(
                index_gm=here[None],
                own_gm=leave_out.language_N[here][None],
                a_gmSL=a_nSL.transpose(0, 1),
                square_gmS=square_nmmS[:, 0].transpose(0, 1),
                inner_gmJS=removed_nSL[:, 0].mT[None],
                rounding=rounding(x_nD.dtype),
            ),
        )
