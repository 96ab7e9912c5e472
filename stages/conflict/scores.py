"""What a pair's scores are, and what is noted about them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.conflict.scratch import Scratch

FLAGS = ("zero_gradient", "single_language", "few_pairs", "no_own_direction", "no_direction", "no_other_direction")
"""zero_gradient: |g| = 0. single_language: no second language has a direction; the score is against the one there is.
few_pairs: fewer than `FEW_PAIRS` in the language. no_own_direction: nothing of the language is left after leaving out.
no_direction: the merged direction left has no length. no_other_direction: that of the other languages has none (they leave with the pair, or
the surgery gives them no weight)."""
_COSINE_BYTES = 2**27
_VALUES = ("score_all", "score_others", "score_mean", "cosine_own")


class PairScores:
    """Per pair, float64 on the CPU. A value is defined where its mask is true and exactly 0 elsewhere; never NaN.

    score_all, score_others, score_mean (no surgery: equal weights), cosine_own [N] with *_valid [N]; norm [N] = |g_i|; alone [N]: of the other
    languages, which there are, none is left; flags {name: [N] bool}. The cosines with every language [N, L] are float32 and lie in a file
    where memory is too small for them: `cosines`. Close it (`with`).
    """

    score_all: Tensor
    score_others: Tensor
    score_mean: Tensor
    cosine_own: Tensor
    score_all_valid: Tensor
    score_others_valid: Tensor
    score_mean_valid: Tensor
    cosine_own_valid: Tensor

    def __init__(self, n: int, n_languages: int, folder: Path | None = None) -> None:
        for name in _VALUES:
            setattr(self, name, torch.zeros(n, dtype=torch.float64))
            setattr(self, f"{name}_valid", torch.zeros(n, dtype=torch.bool))
        self.norm = torch.zeros(n, dtype=torch.float64)
        self.alone = torch.zeros(n, dtype=torch.bool)
        self.flags = {name: torch.zeros(n, dtype=torch.bool) for name in FLAGS}
        self._cosines = Scratch(
            n, n_languages, torch.float32, _COSINE_BYTES, folder, why="the cosines of all pairs with every language"
        )

    def put(self, name: str, index: Tensor, value: Tensor, valid: Tensor) -> None:
        """Set rows of a value and of its mask."""
        getattr(self, name)[index], getattr(self, f"{name}_valid")[index] = value, valid

    def put_cosines(self, index: Tensor, value: Tensor) -> None:
        """Set rows [..., L] of the cosines, float32; NaN where there is none."""
        self._cosines.put(index.flatten(), value.flatten(0, -2))

    def cosines(self, start: int, stop: int) -> Tensor:
        """Cosines with every language [stop - start, L], float32; NaN where there is none."""
        return self._cosines.get(start, stop)

    def used(self, others: bool) -> tuple[Tensor, Tensor]:
        """(score, mask) [N]. others: score_others, which is none where no other language is left, else score_all where one is. A single
        language is scored against itself, which `score_all` is then."""
        single_N = self.flags["single_language"]
        if others:
            return self.score_all.where(single_N, self.score_others), self.score_all_valid.where(
                single_N, self.score_others_valid
            )
        valid_N = self.score_all_valid & ~self.alone
        return self.score_all.where(valid_N, 0.0), valid_N

    def close(self) -> None:
        """Give the cosines back."""
        self._cosines.close()
