"""Drawing the next token of each row from its own seed, so that a row never depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from schemas.config.model import Sampling


class RowSampler:
    """Samples row i of a batch by `samplings[i]` with a generator seeded from `seeds[i]`.

    Inverse-CDF sampling in float64: one uniform number per token, whatever the other rows do.
    Order as in vLLM: temperature, min_p, top_k, top_p. temperature 0 is argmax (lowest id among equals).
    """

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int]) -> None:
        self._samplings = list(samplings)
        # NumPy's, because torch's CPU generator only uses the low 32 bits of a seed.
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Next token ids [B] for logits [B, V]."""
        picks = [
            _pick(row_V.double(), sampling, generator)
            for row_V, sampling, generator in zip(logits_BV.cpu(), self._samplings, self._generators, strict=True)
        ]
        return torch.tensor(picks, dtype=torch.long, device=logits_BV.device)


def _pick(logits_V: torch.Tensor, sampling: Sampling, generator: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V = torch.softmax(logits_V / sampling.temperature, dim=-1)
    if sampling.min_p > 0:
        p_V = torch.where(p_V >= sampling.min_p * p_V.max(), p_V, 0.0)
    if 0 < sampling.top_k < len(p_V):
        p_V = torch.where(p_V >= p_V.topk(sampling.top_k).values[-1], p_V, 0.0)
    if sampling.top_p < 1:
        p_V = p_V / p_V.sum()
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        outside_V = sorted_V.cumsum(-1) - sorted_V >= sampling.top_p
        p_V[order_V[outside_V]] = 0.0
    cdf_V = p_V.cumsum(-1)
    u = generator.random() * cdf_V[-1]
    index = int(torch.searchsorted(cdf_V, u, right=True))
    return min(index, int(p_V.nonzero()[-1]))
