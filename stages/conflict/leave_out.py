"""The conflict score of a pair: its cosine with the merged direction, the pair and its group left out.

With a_k = <g_i, G_k> and R_k = sum over the left-out pairs j of language k of omega_j g_j, Omega_k the sum of their
omegas:

    G'_k  = (G_k - R_k) / (1 - Omega_k)
    a'_k  = (a_k - <g_i, R_k>) / (1 - Omega_k)
    K'_kl = (K_kl - <R_k, G_l> - <G_k, R_l> + <R_k, R_l>) / ((1 - Omega_k)(1 - Omega_l))
    score = w.a' / (|g_i| sqrt(w K' w)).

All of it follows from <g_i, G_k>, K and the inner products inside the left-out group. K' is K and as many rank-one terms as pairs leave, and
only K' w is needed: no matrix is made for a pair, unless `refit` solves for w on it. A pair alone is a group of one.
Without leaving out, pure noise scores +0.09 to +0.17. ConGrad (arXiv 2503.23777) scores against the merged
gradient; its released text has no leave-one-out, which is ours. Surgery may be done per layer group ("segment"): S
of them, each with its own w. Suffixes: g groups of m pairs each, S segments, L languages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.conflict.scores import PairScores
from stages.surgery.methods import Surgery

_AT_ONCE = 2_000_000
_LOST = 1e-13
"""A squared length below this share of the one it is the difference of is rounding (float64)."""


def rounding(dtype: torch.dtype) -> float:
    """A squared length below this share of what it was computed from is nothing. dtype: of the products it was computed from."""
    return 1e-12 if dtype == torch.float64 else 1e-6


class Removal(Protocol):
    """What groups take out of K: K'' = K - <R_k, G_l> - <G_k, R_l> + <R_k, R_l>."""

    def times(self, gram_SLL: Tensor, v_gSL: Tensor) -> Tensor:
        """K'' v [g, S, L]."""
        ...

    def lengths(self, gram_SLL: Tensor) -> tuple[Tensor, Tensor]:
        """(diagonal of K'', |G_k|^2 + |R_k|^2: what it was computed from), [g, S, L]."""
        ...

    def gram(self, gram_SLL: Tensor) -> Tensor:
        """K'' [g, S, L, L]."""
        ...


@dataclass(frozen=True)
class Members:
    """A removal by its pairs j: part_gmL = omega_j in the column of j's language, a_gmSL = <g_j, G_k>, removed_gmSL = <g_j, R_k>."""

    part_gmL: Tensor
    a_gmSL: Tensor
    removed_gmSL: Tensor

    def times(self, gram_SLL: Tensor, v_gSL: Tensor) -> Tensor:
        """See Removal."""
        left_gmSL = self.a_gmSL - self.removed_gmSL
        along_gmS = (left_gmSL * v_gSL[:, None]).sum(dim=-1)
        share_gmS = self.part_gmL @ v_gSL.mT
        y_gSL = (v_gSL.transpose(0, 1) @ gram_SLL).transpose(0, 1)
        y_gSL = y_gSL - (share_gmS[..., None] * self.a_gmSL).sum(dim=1)
        return y_gSL - along_gmS.mT @ self.part_gmL

    def lengths(self, gram_SLL: Tensor) -> tuple[Tensor, Tensor]:
        """See Removal."""
        whole_SL = gram_SLL.diagonal(dim1=-2, dim2=-1)
        part_gm1L = self.part_gmL[:, :, None]
        cross_gSL = (part_gm1L * self.a_gmSL).sum(dim=1)
        own_gSL = (part_gm1L * self.removed_gmSL).sum(dim=1)
        return whole_SL - 2 * cross_gSL + own_gSL, whole_SL + own_gSL

    def gram(self, gram_SLL: Tensor) -> Tensor:
        """See Removal."""
        cross_gSLL = torch.einsum("gjk,gjsl->gskl", self.part_gmL, self.a_gmSL)
        own_gSLL = torch.einsum("gik,gisl->gskl", self.part_gmL, self.removed_gmSL)
        return gram_SLL - cross_gSLL - cross_gSLL.mT + own_gSLL


@dataclass(frozen=True)
class Summed:
    """The removal of one group too large for the products between its pairs: cross_SLL = <R_k, G_l>, own_SLL = <R_k, R_l>."""

    cross_SLL: Tensor
    own_SLL: Tensor

    def times(self, gram_SLL: Tensor, v_gSL: Tensor) -> Tensor:
        """See Removal."""
        return (v_gSL[:, :, None] @ self.gram(gram_SLL))[:, :, 0]

    def lengths(self, gram_SLL: Tensor) -> tuple[Tensor, Tensor]:
        """See Removal."""
        from_SL = (gram_SLL + self.own_SLL).diagonal(dim1=-2, dim2=-1)
        return self.gram(gram_SLL).diagonal(dim1=-2, dim2=-1), from_SL[None]

    def gram(self, gram_SLL: Tensor) -> Tensor:
        """See Removal."""
        return (gram_SLL - self.cross_SLL - self.cross_SLL.mT + self.own_SLL)[None]


@dataclass(frozen=True)
class LeftOut:
    """Pairs (g groups, m of each) and what leaves with their groups."""

    a_gmSL: Tensor  # <g_i, G_k>
    square_gmS: Tensor  # |g_i|^2
    removed_gmSL: Tensor  # <g_i, R_k>
    omega_gL: Tensor  # Omega_k
    count_gL: Tensor  # pairs left out
    removal: Removal
    rounding: float  # see `rounding`


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
        min_pairs: int,
    ) -> None:
        self.language_N, self.omega_N = language_N, omega_N.to(torch.float64)
        self.method, self.refit, self.min_pairs = method, refit, min_pairs
        self.gram_SLL, self.count_L = gram_SLL, count_L
        self.weight_SL = method(self.gram_SLL)
        self.n_languages = int((count_L > 0).sum())
        numbers = self.gram_SLL.numel() if refit else self.gram_SLL[..., 0].numel()
        self.at_once = max(1, _AT_ONCE // numbers)

    def cut(self, index_n: Tensor) -> Iterator[Tensor]:
        """Cut row indices so that [block, S, L], with refit [block, S, L, L], stays small."""
        return iter(index_n.split(self.at_once) if len(index_n) else ())

    def parts(self, index_gm: Tensor) -> Tensor:
        """omega_j of every pair in its own language's column [g, m, L]."""
        part_gmL = torch.zeros(*index_gm.shape, len(self.count_L), dtype=torch.float64)
        return part_gmL.scatter_(-1, self.language_N[index_gm][..., None], self.omega_N[index_gm][..., None])

    def counts(self, index_gm: Tensor) -> Tensor:
        """Pairs of every language that are in its direction [g, L]."""
        count_gL = torch.zeros(len(index_gm), len(self.count_L), dtype=torch.int64)
        return count_gL.scatter_add_(1, self.language_N[index_gm], (self.omega_N[index_gm] > 0).long())

    def leave(self, index_gm: Tensor, a_gmSL: Tensor, inner_gmmS: Tensor, nothing: float) -> LeftOut:
        """The m pairs of each group leave together; inner_gmmS = <g_i, g_j>; nothing: `rounding` of the products."""
        part_gmL = self.parts(index_gm)
        removed_gmSL = torch.einsum("gijs,gjk->gisk", inner_gmmS, part_gmL)
        return LeftOut(
            a_gmSL,
            inner_gmmS.diagonal(dim1=1, dim2=2).mT,
            removed_gmSL,
            part_gmL.sum(dim=1),
            self.counts(index_gm),
            Members(part_gmL, a_gmSL, removed_gmSL),
            nothing,
        )

    def write(self, scores: PairScores, index_gm: Tensor, left: LeftOut) -> None:
        """Fill the rows `index_gm` of `scores`."""
        own_gm = self.language_N[index_gm]
        keep_gL = 1.0 - left.omega_gL
        alive_gL = (self.count_L - left.count_gL > 0) & (keep_gL > rounding(torch.float64))
        length_gSL, from_gSL = left.removal.lengths(self.gram_SLL)
        solid_gSL = (length_gSL > left.rounding * from_gSL) & alive_gL[:, None]
        length_gSL = length_gSL.where(solid_gSL, 0.0)
        factor_gSL = torch.where(solid_gSL, 1.0 / keep_gL.where(alive_gL, 1.0)[:, None], 0.0)
        weight_gSL = self.weight_SL
        if self.refit:
            weight_gSL = self.method(
                left.removal.gram(self.gram_SLL) * factor_gSL[..., :, None] * factor_gSL[..., None, :]
            )
        a_gmSL = (left.a_gmSL - left.removed_gmSL) * solid_gSL[:, None]
        norm_gm = left.square_gmS.sum(dim=-1).sqrt()

        scores.norm[index_gm] = norm_gm
        merged = _Merged(self.gram_SLL, left, weight_gSL * factor_gSL, length_gSL, a_gmSL, norm_gm)
        scores.put("score_all", index_gm, *merged.cosine())
        scores.put("score_others", index_gm, *merged.cosine_without(own_gm))
        plain = _Merged(self.gram_SLL, left, factor_gSL, length_gSL, a_gmSL, norm_gm)
        scores.put("score_mean", index_gm, *plain.cosine())

        size_gmL = norm_gm[..., None] * length_gSL.sum(dim=1).sqrt()[:, None]
        there_gmL = size_gmL > 0
        cosine_gmL = torch.where(there_gmL, a_gmSL.sum(dim=2) / torch.where(there_gmL, size_gmL, 1.0), 0.0)
        cosine_gmL = cosine_gmL.clamp(-1, 1)
        own = own_gm[..., None]
        scores.put("cosine_own", index_gm, cosine_gmL.gather(-1, own)[..., 0], there_gmL.gather(-1, own)[..., 0])
        scores.put_cosines(index_gm, cosine_gmL, there_gmL)

        there_gL = solid_gSL.any(dim=1)
        own_there_gm, several = there_gL.gather(-1, own_gm), self.n_languages > 1
        flags = scores.flags
        flags["zero_gradient"][index_gm] = norm_gm == 0
        flags["single_language"][index_gm] = not several
        flags["few_pairs"][index_gm] = self.count_L[own_gm] < self.min_pairs
        flags["no_own_direction"][index_gm] = ~own_there_gm
        flags["no_direction"][index_gm] = ~scores.score_all_valid[index_gm] & (norm_gm > 0)
        flags["no_other_direction"][index_gm] = several & ~scores.score_others_valid[index_gm] & (norm_gm > 0)
        scores.alone[index_gm] = several & (there_gL.sum(dim=1)[:, None] == own_there_gm.long())


class _Merged:
    """The merged direction u = sum_k v_k (G_k - R_k) of g groups and the pairs' products with it.

    v_gSL: weights over 1 - Omega, zero where a direction is nothing; length_gSL = |G_k - R_k|^2; a_gmSL = <g_i, G_k - R_k>.
    """

    def __init__(
        self, gram_SLL: Tensor, left: LeftOut, v_gSL: Tensor, length_gSL: Tensor, a_gmSL: Tensor, norm_gm: Tensor
    ) -> None:
        self._v_gSL, self._a_gmSL, self._norm_gm, self._rounding = v_gSL, a_gmSL, norm_gm, left.rounding
        self._length_gSL = length_gSL
        self._y_gSL = left.removal.times(gram_SLL, v_gSL)
        self._along_gm = (v_gSL[:, None] * a_gmSL).sum(dim=(-1, -2))
        self._square_g = (v_gSL * self._y_gSL).sum(dim=(-1, -2))
        self._size_gSL = v_gSL.abs() * length_gSL.sqrt()
        self._size_g = self._size_gSL.sum(dim=(-1, -2))

    def cosine(self) -> tuple[Tensor, Tensor]:
        """(cosine [g, m], defined); undefined where the pair or u has no length.

        A squared length that is rounding error beside the lengths it was summed from (directions that cancel) counts as zero.
        """
        shape = self._along_gm.shape
        return self._value(self._along_gm, self._square_g[:, None].expand(shape), self._size_g[:, None].expand(shape))

    def cosine_without(self, own_gm: Tensor) -> tuple[Tensor, Tensor]:
        """The same with u without the language own_gm of each pair."""
        at_gmS = own_gm[..., None].expand(*own_gm.shape, self._v_gSL.shape[1])

        def own(x_gSL: Tensor) -> Tensor:
            return x_gSL.mT.gather(1, at_gmS)

        v_gmS = own(self._v_gSL)
        a_gmS = self._a_gmSL.gather(-1, at_gmS[..., None])[..., 0]
        along_gm = self._along_gm - (v_gmS * a_gmS).sum(dim=-1)
        change_gmS = v_gmS * (v_gmS * own(self._length_gSL) - 2 * own(self._y_gSL))
        square_gm = self._square_g[:, None] + change_gmS.sum(dim=-1)
        size_gm = self._size_g[:, None] - own(self._size_gSL).sum(dim=-1)
        value_gm, valid_gm = self._value(along_gm, square_gm, size_gm)
        valid_gm = valid_gm & (square_gm > _LOST * self._size_g[:, None].square())
        return value_gm.where(valid_gm, 0.0), valid_gm

    def _value(self, along_gm: Tensor, square_gm: Tensor, size_gm: Tensor) -> tuple[Tensor, Tensor]:
        valid_gm = (self._norm_gm > 0) & (square_gm > self._rounding * size_gm.square())
        scale_gm = torch.where(valid_gm, self._norm_gm * square_gm.clamp_min(0.0).sqrt(), 1.0)
        return torch.where(valid_gm, along_gm / scale_gm, 0.0).clamp(-1.0, 1.0), valid_gm
