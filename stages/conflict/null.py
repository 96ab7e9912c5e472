"""What conflict rate appears when there is nothing to find: a null beside which a rate may be reported.

Two seeded nulls, drawn as factors per pair that `directions.signed_directions` sums in one pass. Sign flips: every pair keeps its gradient but gets a random sign,
so that languages share nothing; about half of all cosines come out negative, and the spread of the *count* tells
how unusual the observed one is. Split halves: each language is cut in two at random, pairs that share an answer on one side; cosines between halves of the
SAME language have one direction in truth, so a negative one is sampling noise, and a conflict rate between
languages means little unless it is clearly above this rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.conflict.directions import cosines
from stages.conflict.stream import Columns

_ROUNDING = 1e-5  # a half this much shorter than the other is what float32 left of nothing


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


def flip_signs(n: int, draws: int = 20, seed: int = 0) -> Tensor:
    """Random signs [R, N], int8."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(0, 2, (draws, n), generator=generator, dtype=torch.int8) * 2 - 1


def half_masks(language_N: Tensor, group_N: Tensor, n_languages: int, draws: int = 20, seed: int = 0) -> Tensor:
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
    for c in columns:
        part_RLD = sums_RLD[:, :, c].to(torch.float64)
        cosine_RLL, valid_RLL = cosines(part_RLD @ part_RLD.mT)
        cosine.append(cosine_RLL[:, upper[0], upper[1]])
        valid.append(valid_RLL[:, upper[0], upper[1]])
    return Null(torch.stack(cosine, dim=1), torch.stack(valid, dim=1))


def split_half_null(first_RLD: Tensor, directions_LD: Tensor, columns: Sequence[Columns] = (slice(None),)) -> Null:
    """Cosines between two random halves of each language: the directions summed with `half_masks`, and the rest.

    A language with fewer than two pairs has no valid comparison.
    """
    cosine, valid = [], []
    for c in columns:
        a_RLD = first_RLD[:, :, c].to(torch.float64)
        b_RLD = directions_LD[:, c] - a_RLD
        a_RL, b_RL = (part.square().sum(dim=2).sqrt() for part in (a_RLD, b_RLD))
        valid_RL = torch.minimum(a_RL, b_RL) > _ROUNDING * torch.maximum(a_RL, b_RL)
        scale_RL = a_RL * b_RL
        product_RL = (a_RLD * b_RLD).sum(dim=2)
        cosine.append(torch.where(valid_RL, product_RL / torch.where(valid_RL, scale_RL, 1.0), 0.0))
        valid.append(valid_RL)
    return Null(torch.stack(cosine, dim=1), torch.stack(valid, dim=1))
