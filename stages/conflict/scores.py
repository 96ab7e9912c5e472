"""The conflict score of a pair: its cosine with the merged direction, the pair and its group left out.

With a_k = <g_i, G_k> and R_k = sum over the left-out pairs j of language k of omega_j g_j, Omega_k the sum of their
omegas:

    G'_k  = (G_k - R_k) / (1 - Omega_k)
    a'_k  = (a_k - <g_i, R_k>) / (1 - Omega_k)
    K'_kl = (K_kl - <R_k, G_l> - <G_k, R_l> + <R_k, R_l>) / ((1 - Omega_k)(1 - Omega_l))
    score = w.a' / (|g_i| sqrt(w K' w)).

All of it follows from <g_i, G_k>, K and the inner products inside the left-out group. A pair alone is a group of one.
Without leaving out, pure noise scores +0.09 to +0.17. ConGrad (arXiv 2503.23777) scores against the merged
gradient; its released text has no leave-one-out, which is ours. Surgery may be done per layer group ("segment"): S
of them, each with its own w. Suffixes: g groups of m pairs each, S segments, L languages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.conflict.directions import grams
from stages.conflict.scratch import Kept
from stages.conflict.stream import BLOCK, Chunks, Columns, blocks, check_finite, wide
from stages.conflict.surgery import Surgery

FLAGS = ("zero_gradient", "single_language", "few_pairs", "no_own_direction", "no_direction")
"""zero_gradient: |g| = 0. single_language: no other language has a pair; the score is against the own direction.
few_pairs: fewer than `min_pairs` in the language. no_own_direction: nothing of the language is left after leaving out.
no_direction: the merged direction left has no length."""

_ROUNDING = 1e-12  # a squared length below this share of what it was computed from is nothing
_BLOCK_ELEMENTS = 2_000_000
KEPT_BYTES = 2**30
"""Of sketches that wait in memory for those they leave with."""


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

    def used(self, others: bool) -> tuple[Tensor, Tensor]:
        """(score, mask) [N]: score_others where there is one and `others` is wanted, else score_all."""
        others_N = self.score_others_valid & others
        return self.score_others.where(others_N, self.score_all), others_N | self.score_all_valid

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
    scratch_bytes: int = KEPT_BYTES,
    kept: Kept | None = None,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Scores:
    """Score every pair of the stream the directions were made from (same g_i, same order, same omegas).

    columns: the S segments of sketch columns that get their own surgery; they partition D. group_N [N] int64: pairs
    with equal labels leave together (see `merge_groups`); None: each pair leaves alone. refit=False keeps w at its
    value from all pairs; True solves for w again on every K', with the same random orders.

    kept: the rows that an earlier pass over the stream put aside, by the labels that count then; only if it is not
    `complete` the stream is read again. None: a pass here puts them aside, in memory of at most `scratch_bytes` or a
    temporary file. advance: is told of pairs that are scored without being read. Raises UserError when there is no room.
    """
    n, n_languages = language_N.shape[0], directions_LD.shape[0]
    if kept is None:
        with Kept(torch.arange(n) if group_N is None else group_N, scratch_bytes) as found:
            for block in blocks(chunks):
                found.put(block)
            return score_pairs(
                chunks,
                language_N,
                omega_N,
                directions_LD,
                method,
                columns=columns,
                refit=refit,
                min_pairs=min_pairs,
                kept=found,
                advance=advance,
            )
    products = _Products(directions_LD, columns)
    count_L = torch.bincount(language_N, minlength=n_languages)
    scorer = _Scorer(language_N, omega_N, products.gram_SLL, method, count_L, refit, min_pairs)
    scores = Scores.empty(n, n_languages)
    for block in () if kept.complete else blocks(chunks):
        (alone_m,) = (kept.layout.slot_N[block.start : block.stop] < 0).nonzero(as_tuple=True)
        for few_n in scorer.cut(alone_m):
            index_n1 = block.start + few_n[:, None]
            x_nD = wide(block.x_ND if len(few_n) == len(block.x_ND) else block.x_ND[few_n])
            a_nSL, p_nmmS = products(x_nD[:, None], block.factor_N[few_n, None])
            check_finite(p_nmmS, block)
            scorer.write(scores, index_n1, scorer.leave(index_n1, a_nSL, p_nmmS))
    for start, index_gm in kept.layout.batches(min(BLOCK, scorer.at_once)):
        if index_gm.shape[1] > BLOCK:
            _score_large(scores, scorer, products, kept, start, index_gm[0])
        else:
            x_gmD = wide(kept.get(start, start + index_gm.numel())).view(*index_gm.shape, -1)
            a_gmSL, p_gmmS = products(x_gmD, kept.factor_N[index_gm])
            scorer.write(scores, index_gm, scorer.leave(index_gm, a_gmSL, p_gmmS))
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
    scorer = _Scorer(language_N, omega_N, gram_SLL, method, count_L, refit, min_pairs)
    scores = Scores.empty(language_N.shape[0], gram_SLL.shape[-1])
    start, total = 0, language_N.shape[0]
    for a_nSL, square_nS in chunks:
        for few_n in scorer.cut(torch.arange(min(len(a_nSL), total - start))):
            index_n1 = start + few_n[:, None]
            left = scorer.leave(index_n1, a_nSL[few_n, None], square_nS[few_n, None, None])
            scorer.write(scores, index_n1, left)
        start += len(a_nSL)
    if start != total:
        raise ValueError(f"the stream has {start} or more rows for {total} pairs")
    return scores


class _Products:
    """Inner products of pairs with the directions and with each other, per segment."""

    def __init__(self, directions_LD: Tensor, columns: Sequence[Columns]) -> None:
        self.columns = [as_slice(c) for c in columns]
        self.directions_LD = directions_LD
        self.gram_SLL = grams(directions_LD, self.columns)

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
    scorer: _Scorer,
    products: _Products,
    kept: Kept,
    start: int,
    index_m: Tensor,
) -> None:
    """A group too large to hold: sum what leaves first, then go through its pairs again."""
    removed_LD = torch.zeros_like(products.directions_LD)
    for at in range(0, len(index_m), BLOCK):
        here = index_m[at : at + BLOCK]
        x_nD = wide(kept.get(start + at, start + at + len(here)))
        part_nL = scorer.parts(here[None])[0] * kept.factor_N[here, None]
        removed_LD += part_nL.to(x_nD.dtype).T @ x_nD
    pairs_of_columns = [(removed_LD[:, c], products.directions_LD[:, c]) for c in products.columns]
    cross_SLL = torch.stack([removed @ direction.T for removed, direction in pairs_of_columns])
    omega_L = scorer.parts(index_m[None])[0].sum(dim=0)
    count_L = torch.bincount(scorer.language_N[index_m], minlength=len(omega_L))
    beside = _Products(removed_LD, products.columns)
    for at in range(0, len(index_m), BLOCK):
        here = index_m[at : at + BLOCK]
        x_nD = wide(kept.get(start + at, start + at + len(here)))
        a_nSL, square_nmmS = products(x_nD[:, None], kept.factor_N[here, None])
        removed_nSL, _ = beside(x_nD[:, None], kept.factor_N[here, None])
        shared = (omega_L[None], count_L[None], cross_SLL[None], beside.gram_SLL[None])
        left = _LeftOut(a_nSL.transpose(0, 1), square_nmmS[:, 0].transpose(0, 1), removed_nSL.transpose(0, 1), *shared)
        scorer.write(scores, here[None], left)


class _Scorer:
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
        self.at_once = max(1, _BLOCK_ELEMENTS // self.gram_SLL.numel())

    def cut(self, index_n: Tensor) -> Iterator[Tensor]:
        """Cut row indices so that [block, S, L, L] stays small."""
        return iter(index_n.split(self.at_once) if len(index_n) else ())

    def parts(self, index_gm: Tensor) -> Tensor:
        """omega_j of every pair in its own language's column [g, m, L]."""
        own_gmL = torch.nn.functional.one_hot(self.language_N[index_gm], len(self.count_L))
        return own_gmL * self.omega_N[index_gm][..., None]

    def leave(self, index_gm: Tensor, a_gmSL: Tensor, inner_gmmS: Tensor) -> _LeftOut:
        """The m pairs of each group leave together; inner_gmmS = <g_i, g_j>."""
        part_gmL = self.parts(index_gm)
        own_gmL = torch.nn.functional.one_hot(self.language_N[index_gm], len(self.count_L))
        removed_gmSL = torch.einsum("gijs,gjk->gisk", inner_gmmS, part_gmL)
        return _LeftOut(
            a_gmSL,
            inner_gmmS.diagonal(dim1=1, dim2=2).mT,
            removed_gmSL,
            part_gmL.sum(dim=1),
            own_gmL.sum(dim=1),
            torch.einsum("gjk,gjsl->gskl", part_gmL, a_gmSL),
            torch.einsum("gik,gisl->gskl", part_gmL, removed_gmSL),
        )

    def write(self, scores: Scores, index_gm: Tensor, left: _LeftOut) -> None:
        """Fill the rows `index_gm` of `scores`."""
        language_gm = self.language_N[index_gm]
        keep_gL = 1.0 - left.omega_gL
        alive_gL = (self.count_L - left.count_gL > 0) & (keep_gL > _ROUNDING)
        factor_gL = torch.where(alive_gL, 1.0 / torch.where(alive_gL, keep_gL, 1.0), 0.0)
        outer_gSLL = (factor_gL[:, :, None] * factor_gL[:, None, :])[:, None]
        gram_gSLL = (self.gram_SLL - left.cross_gSLL - left.cross_gSLL.mT + left.rr_gSLL) * outer_gSLL
        size_gSL = (self.gram_SLL + left.rr_gSLL).diagonal(dim1=-2, dim2=-1) * factor_gL[:, None].square()
        solid_gSL = gram_gSLL.diagonal(dim1=-2, dim2=-1) > _ROUNDING * size_gSL
        gram_gSLL = gram_gSLL * (solid_gSL[..., :, None] & solid_gSL[..., None, :])
        a_gmSL = (left.a_gmSL - left.removed_gmSL) * (factor_gL[:, None] * solid_gSL)[:, None]
        weight_gSL = self.method(gram_gSLL) if self.refit else self.weight_SL.expand(gram_gSLL.shape[:-1])
        norm_gm = left.square_gmS.sum(dim=-1).sqrt()
        other_gmL = torch.arange(len(self.count_L)) != language_gm[..., None]
        others_gmSL = weight_gSL[:, None] * other_gmL[:, :, None]

        scores.norm[index_gm] = norm_gm
        merged = (
            ("score_all", weight_gSL[:, None]),
            ("score_others", others_gmSL),
            ("score_mean", torch.ones_like(weight_gSL)[:, None]),
        )
        for name, weights in merged:
            value_gm, valid_gm = merged_cosine(weights, a_gmSL, gram_gSLL[:, None], norm_gm)
            getattr(scores, name)[index_gm], getattr(scores, f"{name}_valid")[index_gm] = value_gm, valid_gm

        length_gL = gram_gSLL.diagonal(dim1=-2, dim2=-1).sum(dim=1).sqrt()
        scale_gmL = norm_gm[..., None] * length_gL[:, None]
        valid_gmL = scale_gmL > 0
        cosine_gmL = torch.where(valid_gmL, a_gmSL.sum(dim=2) / torch.where(valid_gmL, scale_gmL, 1.0), 0.0).clamp(
            -1, 1
        )
        scores.cosines[index_gm], scores.cosines_valid[index_gm] = cosine_gmL, valid_gmL
        own = language_gm[..., None]
        scores.cosine_own[index_gm] = cosine_gmL.gather(-1, own)[..., 0]
        scores.cosine_own_valid[index_gm] = valid_gmL.gather(-1, own)[..., 0]

        flags = scores.flags
        flags["zero_gradient"][index_gm] = norm_gm == 0
        flags["single_language"][index_gm] = bool((self.count_L > 0).sum() < 2)
        flags["few_pairs"][index_gm] = self.count_L[language_gm] < self.min_pairs
        flags["no_own_direction"][index_gm] = ~(length_gL.gather(-1, language_gm) > 0)
        flags["no_direction"][index_gm] = ~scores.score_all_valid[index_gm] & (norm_gm > 0)


def merged_cosine(weight: Tensor, a: Tensor, gram: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(w.a / (|g| sqrt(w K w)) [...], defined [...]) summed over segments; undefined where a length vanishes.

    weight, a [..., S, L], gram [..., S, L, L], norm [...], broadcast. A merged direction whose squared length is
    rounding error beside the lengths it was summed from (directions that cancel) counts as zero.
    """
    along = (weight * a).sum(dim=(-1, -2))
    square = (weight * (gram @ weight[..., None])[..., 0]).sum(dim=(-1, -2))
    parts = (weight.abs() * gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()).sum(dim=(-1, -2))
    valid = (norm > 0) & (square > _ROUNDING * parts.square())
    scale = torch.where(valid, norm * square.clamp_min(0.0).sqrt(), 1.0)
    return torch.where(valid, along / scale, 0.0).clamp(-1.0, 1.0), valid


def as_slice(columns: Columns) -> Columns:
    """Column indices that follow each other as a slice: cut without copying."""
    if isinstance(columns, slice) or not len(columns):
        return columns
    first = int(columns[0])
    follow = torch.equal(columns, torch.arange(first, first + len(columns)))
    return slice(first, first + len(columns)) if follow else columns


@dataclass(frozen=True)
class _LeftOut:
    """What the groups leave out."""

    a_gmSL: Tensor  # <g_i, G_k>
    square_gmS: Tensor  # |g_i|^2
    removed_gmSL: Tensor  # <g_i, R_k>
    omega_gL: Tensor  # Omega_k
    count_gL: Tensor  # pairs left out
    cross_gSLL: Tensor  # <R_k, G_l>
    rr_gSLL: Tensor  # <R_k, R_l>
