"""The conflict score of a pair: its cosine with the merged direction, the pair and its group left out.

With a_k = <g_i, G_k> and R_k = sum over the left-out pairs j of language k of omega_j g_j, Omega_k the sum of their
omegas:

    G'_k  = (G_k - R_k) / (1 - Omega_k)
    a'_k  = (a_k - <g_i, R_k>) / (1 - Omega_k)
    K'_kl = (K_kl - <R_k, G_l> - <G_k, R_l> + <R_k, R_l>) / ((1 - Omega_k)(1 - Omega_l))
    score = w.a' / (|g_i| sqrt(w K' w)).

All of it follows from <g_i, G_k>, K and the inner products inside the left-out group. A group changes the directions of its own pairs' languages
only, so what is said of the others is said once for all groups; no matrix is made for a pair, unless `refit` solves for w on K'. A pair alone is
a group of one; of a group too large to hold its sums R_k leave in its pairs' place.
Without leaving out, pure noise scores +0.09 to +0.17. ConGrad (arXiv 2503.23777) scores against the merged
gradient; its released text has no leave-one-out, which is ours. Surgery may be done per layer group ("segment"): S
of them, each with its own w. Suffixes: g groups of m pairs each, J leavers of a group, S segments, L languages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.tables import FEW_PAIRS
from stages.conflict.merged import Left, Merged
from stages.conflict.scores import PairScores
from stages.surgery.methods import Surgery

_AT_ONCE = 200_000
"""Numbers [block, S, L], which stay near the cores."""
_AT_ONCE_REFIT = 2_000_000
"""Numbers [block, S, L, L]."""


def rounding(dtype: torch.dtype) -> float:
    """A squared length below this share of what it was computed from is nothing. dtype: of the products it was computed from."""
    return 1e-12 if dtype == torch.float64 else 1e-6


@dataclass(frozen=True)
class Leavers:
    """What leaves: r_j times part_gJ[j] leaves the direction of language_gJ[j], with omega_gJ of its omegas and count_gJ of its pairs.

    a_gJSL = <r_j, G_k>; inner_gJJS = <r_i, r_j>. Leavers are pairs, or sums of them.
    """

    language_gJ: Tensor
    part_gJ: Tensor
    omega_gJ: Tensor
    count_gJ: Tensor
    a_gJSL: Tensor
    inner_gJJS: Tensor


@dataclass(frozen=True)
class Scored:
    """Pairs of the groups that leave: a_gmSL = <g_i, G_k>, square_gmS = |g_i|^2, inner_gmJS = <g_i, r_j>; own_gm: a leaver of the pair's language;
    rounding: of these products."""

    index_gm: Tensor
    own_gm: Tensor
    a_gmSL: Tensor
    square_gmS: Tensor
    inner_gmJS: Tensor
    rounding: float


class LeaveOut:
    """What all pairs share: K, w, and the formulas of the module's docstring."""

    def __init__(
        self,
        language_N: Tensor,
        omega_N: Tensor,
        gram_SLL: Tensor,
        method: Surgery,
        count_L: Tensor,
        refit: bool,
    ) -> None:
        self.language_N, self.omega_N = language_N, omega_N.to(torch.float64)
        self.method, self.refit = method, refit
        self.gram_SLL, self.count_L = gram_SLL, count_L
        self.weight_SL = method(self.gram_SLL)
        length_SL = gram_SLL.diagonal(dim1=-2, dim2=-1)
        self.solid_SL = (length_SL > 0) & (count_L > 0)
        self.n_languages = int(self.solid_SL.any(dim=0).sum())
        self.length_SL = length_SL.where(self.solid_SL, 0.0)
        numbers = _AT_ONCE_REFIT // gram_SLL.numel() if refit else _AT_ONCE // gram_SLL[..., 0].numel()
        self.at_once = max(1, numbers)

    def cut(self, index_n: Tensor) -> Iterator[Tensor]:
        """Cut row indices so that [block, S, L], with refit [block, S, L, L], stays small."""
        return iter(index_n.split(self.at_once) if len(index_n) else ())

    def score(self, scores: PairScores, index_gm: Tensor, a_gmSL: Tensor, inner_gmmS: Tensor, nothing: float) -> None:
        """Fill the rows index_gm of `scores`: the m pairs of each group leave together. inner_gmmS = <g_i, g_j>; nothing: `rounding` of the products."""
        omega_gm = self.omega_N[index_gm]
        leavers = Leavers(self.language_N[index_gm], omega_gm, omega_gm, (omega_gm > 0).long(), a_gmSL, inner_gmmS)
        own_gm = torch.arange(index_gm.shape[1]).expand(index_gm.shape)
        square_gmS = inner_gmmS.diagonal(dim1=1, dim2=2).mT
        self.write(scores, leavers, Scored(index_gm, own_gm, a_gmSL, square_gmS, inner_gmmS, nothing))

    def summed(self, index_m: Tensor, cross_SLL: Tensor, own_SLL: Tensor) -> Leavers:
        """The pairs index_m as one group that leaves by its sums: cross_SLL = <R_k, G_l>, own_SLL = <R_k, R_l>."""
        language_m, omega_m, n = self.language_N[index_m], self.omega_N[index_m], len(self.count_L)
        omega_L = torch.zeros(n, dtype=torch.float64).index_add_(0, language_m, omega_m)
        count_L = torch.bincount(language_m[omega_m > 0], minlength=n)
        a_LSL, inner_LLS = cross_SLL.transpose(0, 1), own_SLL.permute(1, 2, 0)
        whole = (torch.arange(n), torch.ones_like(omega_L), omega_L, count_L, a_LSL, inner_LLS)
        return Leavers(*(x[None] for x in whole))

    def write(self, scores: PairScores, leavers: Leavers, pairs: Scored) -> None:
        """Fill the rows of `pairs` in `scores`."""
        left = self._left(leavers, pairs)
        weight_gSL = self._refitted(leavers, left) if self.refit else self.weight_SL.expand(len(left.keep_gJ), -1, -1)
        index_gm, flags, several = pairs.index_gm, scores.flags, self.n_languages > 1
        norm_gm = pairs.square_gmS.sum(dim=-1).sqrt()
        scores.norm[index_gm] = norm_gm
        merged = Merged(self.gram_SLL, left, weight_gSL, norm_gm)
        scores.put("score_all", index_gm, *merged.cosine())
        scores.put("score_others", index_gm, *merged.cosine_without())
        scores.put("score_mean", index_gm, *Merged(self.gram_SLL, left, torch.ones_like(weight_gSL), norm_gm).cosine())

        own_cosine_gm, cosine_gmL = left.cosines(norm_gm)
        there_gm = ~own_cosine_gm.isnan()
        scores.put("cosine_own", index_gm, own_cosine_gm.where(there_gm, 0.0), there_gm)
        scores.put_cosines(index_gm, cosine_gmL)

        own_there_gm, there_g = left.there(pairs.own_gm)
        own_count_gm = self.count_L[self.language_N[index_gm]]
        flags["zero_gradient"][index_gm] = norm_gm == 0
        flags["single_language"][index_gm] = not several
        flags["few_pairs"][index_gm] = own_count_gm < FEW_PAIRS
        flags["no_own_direction"][index_gm] = ~own_there_gm
        flags["no_direction"][index_gm] = ~scores.score_all_valid[index_gm] & (norm_gm > 0)
        flags["no_other_direction"][index_gm] = several & ~scores.score_others_valid[index_gm] & (norm_gm > 0)
        scores.alone[index_gm] = several & (there_g[:, None] == own_there_gm.long())

    def _left(self, leavers: Leavers, pairs: Scored) -> Left:
        language_gJ, part_gJ1 = leavers.language_gJ, leavers.part_gJ[..., None]
        same_gJJ = language_gJ[:, :, None] == language_gJ[:, None, :]
        together_gJJ = same_gJJ.to(torch.float64)
        keep_gJ = 1.0 - (together_gJJ @ leavers.omega_gJ[..., None])[..., 0]
        count_gJ = (same_gJJ * leavers.count_gJ[:, None]).sum(dim=-1)
        alive_gJ = (self.count_L[language_gJ] - count_gJ > 0) & (keep_gJ > rounding(torch.float64))
        parts_gJJ = (
            together_gJJ * leavers.part_gJ[:, :, None]
        )  # of leaver i, in the sum that leaves the language of leaver j

        def removed(inner_gnJS: Tensor) -> Tensor:
            """<x, R_k> [g, n, J, S] of k the leavers' languages, from <x, r_j>."""
            return torch.einsum("gnis,gij->gnjs", inner_gnJS, parts_gJJ)

        at_gJJS = at_languages(leavers.a_gJSL, language_gJ)
        removed_gJJS = removed(leavers.inner_gJJS)
        own_gJS = torch.einsum("gij,gijs->gjs", parts_gJJ, removed_gJJS)
        cross_gJS = torch.einsum("gij,gijs->gjs", parts_gJJ, at_gJJS)
        whole_gJS = self.gram_SLL.diagonal(dim1=-2, dim2=-1).T[language_gJ]
        length_gJS = whole_gJS - 2 * cross_gJS + own_gJS
        solid_gJS = (length_gJS > pairs.rounding * (whole_gJS + own_gJS)) & alive_gJ[..., None]
        alone = pairs.inner_gmJS is leavers.inner_gJJS
        return Left(
            language_gJ=language_gJ,
            first_gJ=~same_gJJ.tril(diagonal=-1).any(dim=-1),
            parts_gJJ=parts_gJJ,
            coefficient_gJ1=part_gJ1,
            keep_gJ=keep_gJ,
            solid_gJS=solid_gJS,
            length_gJS=length_gJS.where(solid_gJS, 0.0),
            a_gJSL=leavers.a_gJSL,
            at_gJJS=at_gJJS,
            inner_gJJS=leavers.inner_gJJS,
            solid_SL=self.solid_SL,
            length_SL=self.length_SL,
            own_gm=pairs.own_gm,
            a_gmSL=pairs.a_gmSL,
            at_gmJS=at_gJJS if alone else at_languages(pairs.a_gmSL, language_gJ),
            inner_gmJS=pairs.inner_gmJS,
            removed_gmJS=removed_gJJS if alone else removed(pairs.inner_gmJS),
            rounding=pairs.rounding,
        )

    def _refitted(self, leavers: Leavers, left: Left) -> Tensor:
        """w [g, S, L] of what is left: the surgery on every K'."""
        shape = (*left.keep_gJ.shape, len(self.count_L))
        part_gJL = torch.zeros(shape, dtype=torch.float64)
        part_gJL.scatter_(-1, left.language_gJ[..., None], leavers.part_gJ[..., None])
        cross_gSLL = torch.einsum("gjk,gjsl->gskl", part_gJL, leavers.a_gJSL)
        removed_gJSL = torch.einsum("gijs,gjk->gisk", leavers.inner_gJJS, part_gJL)
        own_gSLL = torch.einsum("gik,gisl->gskl", part_gJL, removed_gJSL)
        factor_gSL = left.spread(self.solid_SL.to(torch.float64), left.factor_gJS)
        gram_gSLL = self.gram_SLL - cross_gSLL - cross_gSLL.mT + own_gSLL
        return self.method(gram_gSLL * factor_gSL[..., :, None] * factor_gSL[..., None, :])


def at_languages(x_gnSL: Tensor, language_gJ: Tensor) -> Tensor:
    """The columns of the leavers' languages [g, n, J, S]."""
    g, n, segments, _ = x_gnSL.shape
    index = language_gJ[:, None, None].expand(g, n, segments, -1)
    return x_gnSL.gather(-1, index).mT
