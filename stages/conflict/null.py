"""What conflict rate appears when there is nothing to find: a null beside which a rate may be reported.

Two seeded nulls, drawn as factors per pair that `directions.signed_directions` sums in its pass. Sign flips: every pair keeps its
gradient but gets a random sign, so that languages share nothing; about half of all cosines come out negative, and the spread of the
*count* tells how unusual the observed one is. Split halves: each language is cut in two at random, pairs that share an answer on one side;
cosines between halves of the SAME language have one direction in truth, so a negative one is sampling noise, and a conflict rate between
languages means little unless it is clearly above this rate.

Of many pairs a sample is drawn (`Sample`). Flipped sums have no scale, so that theirs stand for all. A half is G / 2 + d, the other
G / 2 - d, with d a sum of n terms of random sign: its length goes with sqrt(sum omega^2), which is known for all pairs and for
those of the sample, and stretches the sample's d. The relative standard error of that is `null_noise_error` in the stage's stats, 0 where
all pairs are in. A rate over 20 draws is right to 0.11 for one language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.conflict.directions import cosines, grams
from stages.conflict.stream import Columns

_ROUNDING = 1e-5  # a half this much shorter than the other is what float32 left of nothing
_PAIRS = 65_536
"""Pairs that nulls are drawn from, all languages together; each language gives at least `_LEAST`."""
_LEAST = 64
_DRAWS = 20
_BYTES = 2**28
"""Of the draws' sums, R x L x D float32: more languages get fewer draws."""
_NEGLIGIBLE = 1e-6
"""An omega below this share of its language's largest moves no direction (an EMA's old minibatches)."""


@dataclass(frozen=True)
class Null:
    """Cosines under the null, [R, S, M]: R draws, S segments, M comparisons; `valid` marks those with lengths.

    M is the number of unordered language pairs (sign flips, order of torch.triu_indices(L, L, 1)) or of languages
    (split halves).
    """

    cosine_RSM: Tensor
    valid_RSM: Tensor

    def tail(self, observed_S: Sequence[int]) -> list[float]:
        """Per segment (1 + draws with at least the observed number of negative cosines) / (1 + R): a one-sided
        p-value."""
        count_RS = ((self.cosine_RSM < 0) & self.valid_RSM).sum(dim=2)
        return ((1 + (count_RS >= torch.tensor(observed_S)).sum(dim=0)) / (1 + len(count_RS))).tolist()

    def negative_rate(self) -> Tensor:
        """Share of the draws with a negative cosine [S, M]; NaN where nothing compares."""
        return ((self.cosine_RSM < 0) & self.valid_RSM).sum(dim=0) / self.valid_RSM.sum(dim=0)


@dataclass(frozen=True)
class Sample:
    """Pairs that both nulls are drawn from, and what takes their sums to all pairs.

    rows_n: ascending; flip_Rn: random signs; half_Rn: 1 in the first of two halves of each language, else 0; share_RL: of the
    sampled omegas in the first half; stretch_L = sqrt(sum omega^2 of all / of the sample); error: the relative standard error of a half's
    noise that comes from sampling, in the language where it is largest; complete: all pairs are in it.
    """

    rows_n: Tensor
    flip_Rn: Tensor
    half_Rn: Tensor
    share_RL: Tensor
    stretch_L: Tensor
    error: float
    complete: bool

    @classmethod
    def draw(
        cls,
        language_N: Tensor,
        group_N: Tensor,
        omega_N: Tensor,
        n_languages: int,
        dim: int,
        seed: int,
        pairs: int = _PAIRS,
    ) -> Sample:
        """group_N: pairs with equal labels are on one side of a halving. `pairs`: how many at most, but `_LEAST` of a language and whole groups;
        fewer pairs than that are all taken."""
        draws = max(2, min(_DRAWS, _BYTES // (8 * n_languages * dim)))
        rows_n = _sampled(language_N, group_N, omega_N, n_languages, pairs, seed)
        language_n, omega_n = language_N[rows_n], omega_N[rows_n]
        flip_Rn = flip_signs(len(rows_n), draws, seed)
        half_Rn = half_masks(language_n, group_N[rows_n], n_languages, draws, seed)

        def by_language(language: Tensor, value: Tensor) -> Tensor:
            return torch.zeros(n_languages, dtype=torch.float64).index_add_(0, language, value.to(torch.float64))

        total_L, square_L = by_language(language_n, omega_n), by_language(language_n, omega_n.square())
        half_RL = torch.stack([by_language(language_n, omega_n * half_n) for half_n in half_Rn])
        error = 0.0
        complete = len(rows_n) == int((omega_N > 0).sum())
        if not complete:
            fourth_L = by_language(language_n, omega_n**4)
            error = float((fourth_L.sqrt() / (2 * square_L)).nan_to_num().max())
        return cls(
            rows_n=rows_n,
            flip_Rn=flip_Rn,
            half_Rn=half_Rn,
            share_RL=half_RL / total_L.where(total_L > 0, 1.0),
            stretch_L=(by_language(language_N, omega_N.square()) / square_L.where(square_L > 0, 1.0)).sqrt(),
            error=error,
            complete=complete,
        )

    @property
    def sign_Rn(self) -> Tensor:
        """What is summed: flips, halves, and every sampled pair once."""
        return torch.cat([self.flip_Rn, self.half_Rn, torch.ones_like(self.flip_Rn[:1])])

    def nulls(self, sums_RLD: Tensor, directions_LD: Tensor, columns: Sequence[Columns]) -> tuple[Null, Null]:
        """(sign flips over all columns, split halves per segment) from the sums made with `sign_Rn`."""
        draws = len(self.flip_Rn)
        flips_RLD, first_RLD, whole_LD = sums_RLD[:draws], sums_RLD[draws : 2 * draws], sums_RLD[-1]
        halves = split_half_null(self._first(first_RLD, whole_LD, directions_LD), directions_LD, columns)
        return sign_flip_null(flips_RLD), halves

    def _first(self, first_RLD: Tensor, whole_LD: Tensor, directions_LD: Tensor) -> Tensor:
        """The first halves of all pairs: share G + stretch (first half of the sample - share of the sample)."""
        if self.complete:
            return first_RLD
        share_RL1 = self.share_RL[..., None].to(first_RLD.dtype)
        noise_RLD = (first_RLD - share_RL1 * whole_LD) * self.stretch_L[:, None].to(first_RLD.dtype)
        return share_RL1 * directions_LD.to(first_RLD.dtype) + noise_RLD


def _sampled(language_N: Tensor, group_N: Tensor, omega_N: Tensor, n_languages: int, pairs: int, seed: int) -> Tensor:
    """Ascending rows [n]: whole groups of each language in random order, until it has given its number."""
    (counted_n,) = (omega_N > 0).nonzero(as_tuple=True)
    if len(counted_n) <= pairs:
        return counted_n
    generator = torch.Generator(device="cpu").manual_seed(seed)
    key_N = torch.rand(int(group_N.max()) + 1, generator=generator, dtype=torch.float64)[group_N]
    quota, chosen = max(_LEAST, pairs // n_languages), []
    for language in range(n_languages):
        (mine_n,) = (language_N == language).nonzero(as_tuple=True)
        omega_n = omega_N[mine_n]
        mine_n = mine_n[omega_n > _NEGLIGIBLE * omega_n.max()] if len(mine_n) else mine_n
        if len(mine_n) > quota:
            key_n = key_N[mine_n]
            mine_n = mine_n[key_n <= key_n.kthvalue(quota).values]
        chosen.append(mine_n)
    return torch.cat(chosen).sort().values


def flip_signs(n: int, draws: int = _DRAWS, seed: int = 0) -> Tensor:
    """Random signs [R, N], int8."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(0, 2, (draws, n), generator=generator, dtype=torch.int8) * 2 - 1


def half_masks(language_N: Tensor, group_N: Tensor, n_languages: int, draws: int = _DRAWS, seed: int = 0) -> Tensor:
    """1 for the first of two random halves of every language, else 0 [R, N], int8.

    group_N [N] int64: pairs with equal labels are on one side, since halves that shared an answer would agree (or, as one's chosen and
    the other's rejected, oppose each other) by that alone. The halves of a language differ by at most one group; a language with one
    group has an empty first half.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    half_RN = torch.zeros(draws, language_N.shape[0], dtype=torch.int8)
    members = [(language_N == language).nonzero()[:, 0] for language in range(n_languages)]
    labels = [torch.unique(group_N[where], return_inverse=True)[1] for where in members]
    for r in range(draws):
        for where, label_n in zip(members, labels, strict=True):
            first_g = torch.zeros(int(label_n.max()) + 1 if len(label_n) else 0, dtype=torch.int8)
            first_g[torch.randperm(len(first_g), generator=generator)[: len(first_g) // 2]] = 1
            half_RN[r, where] = first_g[label_n]
    return half_RN


def sign_flip_null(sums_RLD: Tensor, columns: Sequence[Columns] = (slice(None),)) -> Null:
    """Cosines between languages, from the directions summed with `flip_signs`."""
    n_languages = sums_RLD.shape[1]
    upper = torch.triu_indices(n_languages, n_languages, 1)
    cosine, valid = [], []
    for sums_LD in sums_RLD:  # one draw at a time in float64
        gram_SLL = grams(sums_LD.to(torch.float64), columns)
        cosine_SLL, valid_SLL = cosines(gram_SLL)
        cosine.append(cosine_SLL[:, upper[0], upper[1]])
        valid.append(valid_SLL[:, upper[0], upper[1]])
    return Null(torch.stack(cosine), torch.stack(valid))


def split_half_null(first_RLD: Tensor, directions_LD: Tensor, columns: Sequence[Columns] = (slice(None),)) -> Null:
    """Cosines between two random halves of each language: the directions summed with `half_masks`, and the rest.

    A language with fewer than two pairs has no valid comparison.
    """
    cosine, valid = [], []
    for a_LD in first_RLD:  # one draw at a time in float64
        a_LD = a_LD.to(torch.float64)
        b_LD = directions_LD - a_LD
        products = (a_LD.square(), b_LD.square(), a_LD * b_LD)
        aa_SL, bb_SL, ab_SL = (torch.stack([p_LD[:, c].sum(dim=1) for c in columns]) for p_LD in products)
        a_SL, b_SL = aa_SL.sqrt(), bb_SL.sqrt()
        valid_SL = torch.minimum(a_SL, b_SL) > _ROUNDING * torch.maximum(a_SL, b_SL)
        cosine.append(torch.where(valid_SL, ab_SL / torch.where(valid_SL, a_SL * b_SL, 1.0), 0.0))
        valid.append(valid_SL)
    return Null(torch.stack(cosine), torch.stack(valid))
