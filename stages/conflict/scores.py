"""The conflict score of a pair: its cosine with the merged direction, the pair and its group left out.

With a_k = <g_i, G_k> and R_k = sum over the left-out pairs j of language k of omega_j g_j, Omega_k the sum of their
omegas:

    G'_k  = (G_k - R_k) / (1 - Omega_k)
    a'_k  = (a_k - <g_i, R_k>) / (1 - Omega_k)
    K'_kl = (K_kl - <R_k, G_l> - <G_k, R_l> + <R_k, R_l>) / ((1 - Omega_k)(1 - Omega_l))
    score = w.a' / (|g_i| sqrt(w K' w)).

For a pair alone R_l = omega g_i in its own language and nothing elsewhere: only row and column l of K change.
Without leaving out, pure noise scores +0.09 to +0.17. ConGrad (arXiv 2503.23777) scores against the merged
gradient; its released text has no leave-one-out, which is ours. Surgery may be done per layer group ("segment"): S
of them, each with its own w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.conflict.directions import Chunks, Columns, grams, numbered
from stages.conflict.groups import plan_passes
from stages.conflict.surgery import Surgery

FLAGS = ("zero_gradient", "single_language", "few_pairs", "no_own_direction", "no_direction")
"""zero_gradient: |g| = 0. single_language: no other language has a pair; the score is against the own direction.
few_pairs: fewer than `min_pairs` in the language. no_own_direction: nothing of the language is left after leaving out.
no_direction: the merged direction left has no length."""

_ROUNDING = 1e-12  # a squared length below this share of what it was computed from is nothing
_BLOCK_ELEMENTS = 2_000_000


@dataclass
class Scores:
    """Per pair, float64 on the CPU. A value is defined where its mask is true and exactly 0 elsewhere; never NaN.

    score_all, score_others, score_mean (no surgery: equal weights), cosine_own [N] with *_valid [N]; cosines [N, L] with cosines_valid; norm [N] = |g_i|;
    flags {name: [N] bool}.
    """

    score_all: Tensor
    score_others: Tensor
    score_mean: Tensor
    cosine_own: Tensor
    cosines: Tensor
    norm: Tensor
    score_all_valid: Tensor
    score_others_valid: Tensor
    score_mean_valid: Tensor
    cosine_own_valid: Tensor
    cosines_valid: Tensor
    flags: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, n: int, n_languages: int) -> Scores:
        """All values undefined."""

        def value(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        def mask(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.bool)

        return cls(
            score_all=value(n),
            score_others=value(n),
            score_mean=value(n),
            cosine_own=value(n),
            cosines=value(n, n_languages),
            norm=value(n),
            score_all_valid=mask(n),
            score_others_valid=mask(n),
            score_mean_valid=mask(n),
            cosine_own_valid=mask(n),
            cosines_valid=mask(n, n_languages),
            flags={name: mask(n) for name in FLAGS},
        )

    def optional(self, name: str) -> list[float | None]:
        """A [N] column as Python values, None where undefined: `score_all`, `score_mean`, `cosine_own`, ..."""
        values, valid = getattr(self, name), getattr(self, f"{name}_valid")
        return [v if ok else None for v, ok in zip(values.tolist(), valid.tolist(), strict=True)]

    def conflicting(self, languages: Sequence[str]) -> list[list[str]]:
        """For every pair the languages whose direction it opposes (cosine < 0)."""
        negative = (self.cosines_valid & (self.cosines < 0)).tolist()
        return [[name for name, bad in zip(languages, row, strict=True) if bad] for row in negative]

    def flag_names(self) -> list[list[str]]:
        """For every pair the names of its flags."""
        columns = [self.flags[name].tolist() for name in FLAGS]
        return [[name for name, on in zip(FLAGS, row, strict=True) if on] for row in zip(*columns, strict=True)]


def score_pairs(
    chunks: Chunks,
    language_N: Tensor,
    omega_N: Tensor,
    directions_LD: Tensor,
    method: Surgery,
    *,
    columns: Sequence[Columns] = (slice(None),),
    group_N: Tensor | None = None,
    refit: bool = False,
    min_pairs: int = 20,
    max_held_rows: int = 8192,
) -> Scores:
    """Score every pair of the stream the directions were made from (same g_i, same order, same omegas).

    columns: the S segments of sketch columns that get their own surgery; they partition D. group_N [N] int64: pairs
    with equal labels leave together (see `merge_groups`); None: each pair leaves alone. refit=False keeps w at its
    value from all pairs; True solves for w again on every K', with the same random orders.

    Memory: the results, one chunk, and at most `max_held_rows` rows of float64 sketches of groups with several
    members (a larger group is held alone); scattered groups cost further passes over the stream instead.
    """
    n_languages = directions_LD.shape[0]
    scorer = _Scorer(language_N, omega_N, directions_LD, method, columns, refit, min_pairs)
    labels = list(range(language_N.shape[0])) if group_N is None else group_N.tolist()
    passes = plan_passes(labels, max_held_rows) or [{}]
    several = {group for chosen in passes for group in chosen}
    alone_N = torch.tensor([label not in several for label in labels], dtype=torch.bool)
    scores = Scores.empty(language_N.shape[0], n_languages)

    for number, chosen in enumerate(passes):
        held: dict[int, list[tuple[int, Tensor]]] = {}
        for start, chunk_ND in numbered(chunks):
            stop = start + chunk_ND.shape[0]
            if number == 0:
                for index_n in scorer.blocks(alone_N[start:stop].nonzero()[:, 0]):
                    g_nD = chunk_ND[index_n]
                    scorer.write(scores, index_n + start, scorer.leave_one(index_n + start, g_nD))
            for i in range(start, stop):
                if labels[i] not in chosen:
                    continue
                members = held.setdefault(labels[i], [])
                members.append((i, chunk_ND[i - start].clone()))
                if len(members) == chosen[labels[i]]:
                    del held[labels[i]]
                    index_n = torch.tensor([j for j, _ in members])
                    g_nD = torch.stack([g_D for _, g_D in members])
                    scorer.write(scores, index_n, scorer.leave_group(index_n, g_nD))
    return scores


class _Scorer:
    """What all pairs share: directions, K, w, and the formulas of the module's docstring."""

    def __init__(
        self,
        language_N: Tensor,
        omega_N: Tensor,
        directions_LD: Tensor,
        method: Surgery,
        columns: Sequence[Columns],
        refit: bool,
        min_pairs: int,
    ) -> None:
        self.language_N, self.omega_N = language_N, omega_N.to(torch.float64)
        self.directions_LD, self.columns = directions_LD, columns
        self.method, self.refit, self.min_pairs = method, refit, min_pairs
        self.gram_SLL = grams(directions_LD, columns)
        self.weight_SL = method(self.gram_SLL)
        self.count_L = torch.bincount(language_N, minlength=directions_LD.shape[0])

    def blocks(self, index_n: Tensor) -> Iterator[Tensor]:
        """Cut row indices so that [block, S, L, L] stays small."""
        return iter(index_n.split(max(1, _BLOCK_ELEMENTS // self.gram_SLL.numel())) if len(index_n) else ())

    def products(self, g_nD: Tensor) -> tuple[Tensor, Tensor]:
        """(a [n, S, L], |g|^2 [n, S]) per segment."""
        a_nSL = torch.stack([g_nD[:, c] @ self.directions_LD[:, c].T for c in self.columns], dim=1)
        square_nS = torch.stack([g_nD[:, c].square().sum(dim=1) for c in self.columns], dim=1)
        return a_nSL, square_nS

    def leave_one(self, index_n: Tensor, g_nD: Tensor) -> _LeftOut:
        """Each pair leaves alone."""
        a_nSL, square_nS = self.products(g_nD)
        own_nL = torch.nn.functional.one_hot(self.language_N[index_n], len(self.count_L)).to(torch.float64)
        omega_nL = own_nL * self.omega_N[index_n, None]
        return _LeftOut(
            a_nSL,
            square_nS,
            omega_nL,
            own_nL.long(),
            square_nS[:, :, None] * omega_nL[:, None, :],
            omega_nL[:, None, :, None] * a_nSL[:, :, None, :],
            square_nS[:, :, None, None] * (omega_nL[:, :, None] * omega_nL[:, None, :])[:, None],
        )

    def leave_group(self, index_m: Tensor, g_mD: Tensor) -> _LeftOut:
        """All m pairs leave together: K' is the same for all of them (leading dimension 1)."""
        a_mSL, square_mS = self.products(g_mD)
        own_mL = torch.nn.functional.one_hot(self.language_N[index_m], len(self.count_L)).to(torch.float64)
        omega_mL = own_mL * self.omega_N[index_m, None]
        inside = (own_mL.sum(dim=0) > 0).nonzero()[:, 0]  # languages of the group: R is zero elsewhere
        removed_kD = omega_mL[:, inside].T @ g_mD
        own_mSL = torch.zeros_like(a_mSL)
        rr_SLL = torch.zeros_like(self.gram_SLL)
        for s, c in enumerate(self.columns):
            own_mSL[:, s, inside] = g_mD[:, c] @ removed_kD[:, c].T
            rr_SLL[s, inside[:, None], inside] = removed_kD[:, c] @ removed_kD[:, c].T
        cross_SLL = torch.einsum("mk,msl->skl", omega_mL, a_mSL)
        return _LeftOut(
            a_mSL,
            square_mS,
            omega_mL.sum(dim=0)[None],
            own_mL.sum(dim=0).long()[None],
            own_mSL,
            cross_SLL[None],
            rr_SLL[None],
        )

    def write(self, scores: Scores, index_n: Tensor, left: _LeftOut) -> None:
        """Fill the rows `index_n` of `scores`."""
        language_n = self.language_N[index_n]
        rows = torch.arange(len(index_n))
        keep_nL = 1.0 - left.omega_nL
        alive_nL = (self.count_L - left.count_nL > 0) & (keep_nL > _ROUNDING)
        factor_nL = torch.where(alive_nL, 1.0 / torch.where(alive_nL, keep_nL, 1.0), 0.0)
        outer_nSLL = (factor_nL[:, :, None] * factor_nL[:, None, :])[:, None]
        gram_nSLL = (self.gram_SLL - left.cross_nSLL - left.cross_nSLL.mT + left.rr_nSLL) * outer_nSLL
        size_nSL = (self.gram_SLL + left.rr_nSLL).diagonal(dim1=-2, dim2=-1) * factor_nL[:, None].square()
        solid_nSL = gram_nSLL.diagonal(dim1=-2, dim2=-1) > _ROUNDING * size_nSL
        gram_nSLL = gram_nSLL * (solid_nSL[..., :, None] & solid_nSL[..., None, :])
        a_nSL = (left.a_nSL - left.own_nSL) * factor_nL[:, None] * solid_nSL
        weight_nSL = self.method(gram_nSLL) if self.refit else self.weight_SL.expand(gram_nSLL.shape[:-1])
        norm_n = left.square_nS.sum(dim=1).sqrt()
        other_nL = torch.arange(len(self.count_L)) != language_n[:, None]
        others_nSL = weight_nSL * other_nL[:, None]

        scores.norm[index_n] = norm_n
        merged = (("score_all", weight_nSL), ("score_others", others_nSL), ("score_mean", torch.ones_like(weight_nSL)))
        for name, weights in merged:
            value_n, valid_n = merged_cosine(weights, a_nSL, gram_nSLL, norm_n)
            getattr(scores, name)[index_n], getattr(scores, f"{name}_valid")[index_n] = value_n, valid_n

        length_nL = gram_nSLL.diagonal(dim1=-2, dim2=-1).sum(dim=1).sqrt()
        scale_nL = norm_n[:, None] * length_nL
        valid_nL = scale_nL > 0
        cosine_nL = torch.where(valid_nL, a_nSL.sum(dim=1) / torch.where(valid_nL, scale_nL, 1.0), 0.0).clamp(-1, 1)
        scores.cosines[index_n], scores.cosines_valid[index_n] = cosine_nL, valid_nL
        scores.cosine_own[index_n] = cosine_nL[rows, language_n]
        scores.cosine_own_valid[index_n] = valid_nL[rows, language_n]

        flags = scores.flags
        flags["zero_gradient"][index_n] = norm_n == 0
        flags["single_language"][index_n] = bool((self.count_L > 0).sum() < 2)
        flags["few_pairs"][index_n] = self.count_L[language_n] < self.min_pairs
        flags["no_own_direction"][index_n] = ~(length_nL.expand_as(valid_nL)[rows, language_n] > 0)
        flags["no_direction"][index_n] = ~scores.score_all_valid[index_n] & (norm_n > 0)


def merged_cosine(weight: Tensor, a_nSL: Tensor, gram: Tensor, norm_n: Tensor) -> tuple[Tensor, Tensor]:
    """(w.a / (|g| sqrt(w K w)) [n], defined [n]) summed over segments; undefined where a length vanishes.

    weight and gram may have a leading dimension of 1. A merged direction whose squared length is rounding error
    beside the lengths it was summed from (directions that cancel) counts as zero.
    """
    along_n = (weight * a_nSL).sum(dim=(1, 2))
    square_n = (weight * (gram @ weight[..., None])[..., 0]).sum(dim=(1, 2))
    parts_n = (weight.abs() * gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()).sum(dim=(1, 2))
    valid_n = (norm_n > 0) & (square_n > _ROUNDING * parts_n.square())
    scale_n = torch.where(valid_n, norm_n * square_n.clamp_min(0.0).sqrt(), 1.0)
    return torch.where(valid_n, along_n / scale_n, 0.0).clamp(-1.0, 1.0), valid_n


@dataclass(frozen=True)
class _LeftOut:
    """What n pairs leave out. Terms without the pair's own vector may have n = 1, shared by a whole group."""

    a_nSL: Tensor  # <g_i, G_k>
    square_nS: Tensor  # |g_i|^2
    omega_nL: Tensor  # Omega_k
    count_nL: Tensor  # pairs left out
    own_nSL: Tensor  # <g_i, R_k>
    cross_nSLL: Tensor  # <R_k, G_l>
    rr_nSLL: Tensor  # <R_k, R_l>
