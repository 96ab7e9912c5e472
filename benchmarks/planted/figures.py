"""How well a ranking finds damaged pairs: AUROC and what is left of the damage, with bootstrap intervals.

Everything is a weighted sum over pairs of pairs, so that a bootstrap over questions is a change of weights: draw b
counts each question weight_BQ[b] times, in all languages at once, since translations are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from schemas.config.curation import SelectConfig
from stages.select.stage import rank


def question_weights(questions: int, draws: int, seed: int) -> Tensor:
    """How often each question is drawn [1 + draws, Q] float64; the first row is the sample itself (ones)."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(questions, np.full(questions, 1.0 / questions), size=draws)
    return torch.cat([torch.ones(1, questions, dtype=torch.float64), torch.from_numpy(counts).double()])


def auroc(value_N: Tensor, damaged_N: Tensor, weight_BN: Tensor) -> Tensor:
    """P(an intact pair ranks above a damaged one), ties one half, [B]; NaN where a draw lacks one of the two."""
    bad, good = damaged_N.nonzero()[:, 0], (~damaged_N).nonzero()[:, 0]
    difference = value_N[good, None] - value_N[None, bad]
    above = (difference > 0).double() + 0.5 * (difference == 0).double()
    weight_B = weight_BN[:, good].sum(dim=1) * weight_BN[:, bad].sum(dim=1)
    return ((weight_BN[:, good] @ above) * weight_BN[:, bad]).sum(dim=1) / weight_B


def by_language(value_N: Tensor, damaged_N: Tensor, languages: int, weight_BQ: Tensor) -> Tensor:
    """AUROC inside every language [B, L] of a question-major set."""
    return torch.stack(
        [auroc(value_N[n::languages], damaged_N[n::languages], weight_BQ) for n in range(languages)], dim=1
    )


def overall(value_N: Tensor, damaged_N: Tensor, languages: int, weight_BQ: Tensor) -> Tensor:
    """AUROC over all pairs together [B]: what a global quota sees."""
    return auroc(value_N, damaged_N, weight_BQ.repeat_interleave(languages, dim=1))


def kept_half(
    frame: pl.DataFrame, value_N: Tensor, quota: Literal["language", "global"], pool_N: Tensor | None = None
) -> Tensor:
    """Which pairs the select stage keeps [N] when it keeps half by these values. frame: pair_id, language; pool_N: of these pairs only (None: all)."""
    pool_N = torch.ones(frame.height, dtype=torch.bool) if pool_N is None else pool_N
    pairs = frame.select("pair_id", "language").with_columns(used=pl.Series(value_N.numpy()))
    ranked = rank(pairs.filter(pl.Series(pool_N.numpy())), SelectConfig(keep=0.5, quota=quota))
    return torch.zeros_like(pool_N).masked_scatter(pool_N, torch.tensor(ranked["reason"].is_null().to_list()))


def interval(draws: Sequence[Tensor], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) over seeds of figures [1 + draws] whose first entry is the sample's own."""
    mean_B = torch.stack(list(draws)).nanmean(dim=0)
    rest = mean_B[1:][torch.isfinite(mean_B[1:])]
    tail = (1 - level) / 2
    if not len(rest):
        return float(mean_B[0]), float("nan"), float("nan")
    return float(mean_B[0]), float(rest.quantile(tail)), float(rest.quantile(1 - tail))
