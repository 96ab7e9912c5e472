"""What conflict rate appears when there is nothing to find: a null beside which a rate may be reported.

Two seeded nulls, each one pass over the stream. Sign flips: every pair keeps its gradient but gets a random sign,
so that languages share nothing; about half of all cosines come out negative, and the spread of the *count* tells
how unusual the observed one is. Split halves: each language is cut in two at random; cosines between halves of the
SAME language have one direction in truth, so a negative one is sampling noise, and a conflict rate between
languages means little unless it is clearly above this rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.conflict.directions import Chunks, Columns, cosines, numbered


@dataclass(frozen=True)
class Null:
    """Cosines under the null, [R, S, M]: R draws, S segments, M comparisons; `valid` marks those with lengths.

    M is the number of unordered language pairs (sign flips, order of torch.triu_indices(L, L, 1)) or of languages
    (split halves).
    """

    cosine_RSM: Tensor
    valid_RSM: Tensor

    def negative_rate(self) -> list[float | None]:
        """Share of negative cosines per segment over all draws; None where nothing could be compared."""
        negative_S = ((self.cosine_RSM < 0) & self.valid_RSM).sum(dim=(0, 2)).tolist()
        total_S = self.valid_RSM.sum(dim=(0, 2)).tolist()
        return [n / t if t else None for n, t in zip(negative_S, total_S, strict=True)]

    def tail(self, observed_S: Sequence[int]) -> list[float]:
        """Per segment (1 + draws with at least the observed number of negative cosines) / (1 + R): a one-sided
        p-value."""
        count_RS = ((self.cosine_RSM < 0) & self.valid_RSM).sum(dim=2)
        return ((1 + (count_RS >= torch.tensor(observed_S)).sum(dim=0)) / (1 + len(count_RS))).tolist()


def sign_flip_null(
    chunks: Chunks,
    language_N: Tensor,
    omega_N: Tensor,
    n_languages: int,
    *,
    columns: Sequence[Columns] = (slice(None),),
    draws: int = 20,
    seed: int = 0,
) -> Null:
    """Cosines between languages after random signs per pair. Memory: draws x L x D float64."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sign_RN = torch.randint(0, 2, (draws, language_N.shape[0]), generator=generator).to(torch.float64) * 2 - 1
    sums_RLD = _signed_sums(chunks, language_N, omega_N * sign_RN, n_languages)
    upper = torch.triu_indices(n_languages, n_languages, 1)
    cosine, valid = [], []
    for c in columns:
        part_RLD = sums_RLD[:, :, c]
        cosine_RLL, valid_RLL = cosines(part_RLD @ part_RLD.mT)
        cosine.append(cosine_RLL[:, upper[0], upper[1]])
        valid.append(valid_RLL[:, upper[0], upper[1]])
    return Null(torch.stack(cosine, dim=1), torch.stack(valid, dim=1))


def split_half_null(
    chunks: Chunks,
    language_N: Tensor,
    omega_N: Tensor,
    n_languages: int,
    *,
    columns: Sequence[Columns] = (slice(None),),
    draws: int = 20,
    seed: int = 0,
) -> Null:
    """Cosines between two random halves of each language, omegas as they are. Memory: 2 x draws x L x D float64.

    The halves of a language differ by at most one pair in size; a language with one pair has no valid comparison.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    half_RN = torch.zeros(draws, language_N.shape[0], dtype=torch.float64)
    for r in range(draws):
        for language in range(n_languages):
            where = (language_N == language).nonzero()[:, 0]
            half_RN[r, where[torch.randperm(len(where), generator=generator)[: len(where) // 2]]] = 1.0
    first_RLD = _signed_sums(chunks, language_N, omega_N * half_RN, n_languages)
    second_RLD = _signed_sums(chunks, language_N, omega_N * (1.0 - half_RN), n_languages)
    cosine, valid = [], []
    for c in columns:
        a_RLD, b_RLD = first_RLD[:, :, c], second_RLD[:, :, c]
        scale_RL = a_RLD.square().sum(dim=2).sqrt() * b_RLD.square().sum(dim=2).sqrt()
        valid_RL = scale_RL > 0
        product_RL = (a_RLD * b_RLD).sum(dim=2)
        cosine.append(torch.where(valid_RL, product_RL / torch.where(valid_RL, scale_RL, 1.0), 0.0))
        valid.append(valid_RL)
    return Null(torch.stack(cosine, dim=1), torch.stack(valid, dim=1))


def _signed_sums(chunks: Chunks, language_N: Tensor, weight_RN: Tensor, n_languages: int) -> Tensor:
    """[R, L, D] sums of weighted rows per language, in one pass."""
    sums_LRD: Tensor | None = None
    for start, chunk_ND in numbered(chunks):
        stop = start + chunk_ND.shape[0]
        if sums_LRD is None:
            sums_LRD = torch.zeros(n_languages, weight_RN.shape[0], chunk_ND.shape[1], dtype=torch.float64)
        language_n = language_N[start:stop]
        for language in language_n.unique().tolist():
            mine = language_n == language
            sums_LRD[language] += weight_RN[:, start:stop][:, mine] @ chunk_ND[mine]
    if sums_LRD is None:
        raise ValueError("the stream is empty")
    return sums_LRD.transpose(0, 1)
