"""Reference log-probabilities: taken from the gradients table, checked, recomputed only if they do not hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from stages.gradients.batching import TokenBudget
from stages.gradients.logprobs import score_rows
from stages.gradients.rows import Row
from stages.train.dataset import TrainingPairs

CHECKED_PAIRS = 4
PAIRS_AT_A_TIME = 256
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of the mean token log-probability (nats per token), by compute dtype. Half-precision forwards of
the same row differ that much between batch shapes and kernels; a wrong model or wrong ids differ by far more."""


def checked_references(
    pairs: TrainingPairs, model: PreTrainedModel, compute: torch.dtype, token_budget: int
) -> tuple[TrainingPairs, str | None]:
    """The pairs with reference log-probabilities that `model` (the reference) confirms; a note if they did not hold.

    A few pairs, spread over the table, are scored again; if one side of one differs by more than `TOLERANCE` per token,
    all are recomputed with `model`.
    """
    count = len(pairs)
    sample = sorted({i * count // CHECKED_PAIRS for i in range(CHECKED_PAIRS)} & set(range(count)))
    stored = pairs.references()
    differences = []
    for index, again in zip(sample, _score(pairs, sample, model, token_budget), strict=True):
        pair = pairs.pair(index)
        for side, completion in enumerate((pair.chosen, pair.rejected)):
            differences.append(abs(stored[index][side] - again[side]) / len(completion))
    tolerance = TOLERANCE[compute]
    if all(difference <= tolerance for difference in differences):  # NaN is not
        return pairs, None
    return recomputed(pairs, model, token_budget), (
        "reference log-probabilities of the gradients table differ from the reference model's by up to"
        f" {max(differences):.3g} nats per token (tolerance {tolerance:g}): all were computed again"
    )


def recomputed(
    pairs: TrainingPairs,
    model: PreTrainedModel,
    token_budget: int,
    beats: Callable[[int, str], Callable[[], None]] = lambda amount, unit: lambda: None,
) -> TrainingPairs:
    """The pairs with reference log-probabilities under `model`; beats(batches, unit): announces the work, what it returns is
    called after each batch."""
    starts = range(0, len(pairs), PAIRS_AT_A_TIME)
    found: list[tuple[float, float]] = []
    beat = beats(len(starts), "batch of references")
    for first in starts:
        found += _score(pairs, list(range(first, min(first + PAIRS_AT_A_TIME, len(pairs)))), model, token_budget)
        beat()
    return pairs.with_references(found)


def _score(
    pairs: TrainingPairs, indices: list[int], model: PreTrainedModel, token_budget: int
) -> list[tuple[float, float]]:
    rows: list[Row] = [row for index in indices for row in pairs.pair(index).rows]
    totals = [float(values.double().sum()) for values in score_rows(model, rows, TokenBudget(token_budget))]
    return list(zip(totals[0::2], totals[1::2], strict=True))
