"""Reference log-probabilities: taken from the gradients table, checked, recomputed only if they do not hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from stages.train.dataset import TrainingPairs
from stages.train.scoring import Scorer

CHECKED_PAIRS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of the mean token log-probability (nats per token), by compute dtype. Half-precision forwards of
the same row differ that much between batch shapes and kernels; a wrong model or wrong ids differ by far more."""


def checked_references(
    pairs: TrainingPairs, model: PreTrainedModel, scorer: Scorer, tell: Callable[[str], None]
) -> TrainingPairs:
    """The pairs with reference log-probabilities that `model` (the reference) confirms.

    A few pairs, spread over the table, are scored again; if one side of one differs by more than `TOLERANCE` per token,
    all are recomputed with `model`, which is told first. Raises Stopped as `recomputed`.
    """
    count = len(pairs)
    sample = sorted({i * count // CHECKED_PAIRS for i in range(CHECKED_PAIRS)} & set(range(count)))
    stored = pairs.references()
    again = [_total(values) for values in scorer.token_logps(model, [r for i in sample for r in pairs.pair(i).rows])]
    differences = []
    for number, index in enumerate(sample):
        pair = pairs.pair(index)
        for side, completion in enumerate((pair.chosen, pair.rejected)):
            differences.append(abs(stored[index][side] - again[2 * number + side]) / len(completion))
    tolerance = TOLERANCE[scorer.numbers.compute]
    if all(difference <= tolerance for difference in differences):  # NaN is not
        return pairs
    tell(
        "reference log-probabilities of the gradients table differ from the reference model's by up to"
        f" {max(differences):.3g} nats per token (tolerance {tolerance:g}): all are computed again"
    )
    return recomputed(pairs, model, scorer)


def recomputed(pairs: TrainingPairs, model: PreTrainedModel, scorer: Scorer) -> TrainingPairs:
    """The pairs with reference log-probabilities under `model`. Raises Stopped when the run was asked to stop."""
    rows = (row for index in range(len(pairs)) for row in pairs.pair(index).rows)
    totals = [_total(values) for values in scorer.stream(model, rows, 2 * len(pairs), "reference answer")]
    return pairs.with_references(list(zip(totals[0::2], totals[1::2], strict=True)))


def _total(values: torch.Tensor) -> float:
    return float(values.double().sum())
