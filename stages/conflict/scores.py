"""What a pair's scores are, and what is noted about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FLAGS = ("zero_gradient", "single_language", "few_pairs", "no_own_direction", "no_direction")
"""zero_gradient: |g| = 0. single_language: no other language has a pair; the score is against the own direction.
few_pairs: fewer than `min_pairs` in the language. no_own_direction: nothing of the language is left after leaving out.
no_direction: the merged direction left has no length."""


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
