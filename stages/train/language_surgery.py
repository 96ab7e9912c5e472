"""Conflicts between languages resolved while training: gradient surgery at every step. docs/methods.md section 5.

The gradient of a step is the sum of its languages' shares of it. They are kept apart, and in every bucket (the two factors of one
adapted matrix) merged by a method of `stages.surgery`, after arXiv 2001.06782 and 2602.02495.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.errors import UserError
from schemas.ids import seed_for
from stages.surgery.methods import SUMMED, Surgery, surgery
from stages.train.columns import Collate, ColumnTrainer
from stages.train.dataset import TrainingPairs
from stages.train.phase import Phase
from stages.train.session import Session
from stages.train.trainer import PairTrainer, some_pairs

COLUMN = "language"
_FACTOR = ".lora_"


@dataclass
class WithLanguages:
    """TRL's batch with the language of every pair, as a number [B]."""

    whole: Collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.whole(examples), COLUMN: torch.tensor([example[COLUMN] for example in examples])}


class LanguageSurgeryTrainer(ColumnTrainer):
    """A PairTrainer whose rows have the number of their language. method: of `stages.surgery`.

    A step costs as many backward passes over smaller batches, and as much memory for gradients as there are languages in it. TRL's
    figures of a step are means over its pairs, as without.
    """

    columns = (COLUMN,)
    collate = WithLanguages

    def __init__(self, *args: Any, method: str, **kwargs: Any) -> None:
        self._method = method
        self._apart: dict[int, dict[str, Tensor]] = {}
        self._figures: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> torch.Tensor:
        """A backward pass for each language of the micro-batch; after the step's last one the merged gradient is in place."""
        languages = inputs.pop(COLUMN).tolist()
        losses, pairs = [], []
        had = {name: len(values) for name, values in self._metrics["train"].items()}
        for language in sorted(set(languages)):
            mine = [pair for pair, its in enumerate(languages) if its == language]
            losses.append(super().training_step(model, some_pairs(inputs, mine), num_items_in_batch))
            pairs.append(len(mine))
            self._keep_apart(language)
        for name, values in self._metrics["train"].items():
            if len(each := values[had.get(name, 0) :]) == len(pairs):  # TRL's own mean would be over languages
                values[had.get(name, 0) :] = [float(np.average(each, weights=pairs))]
        if self.accelerator.sync_gradients:
            self._figures = place_resolved(dict(self.model.named_parameters()), self._apart, self._method, self._seed())
            self._apart = {}
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with what the step's surgery met."""
        super().log(logs | self._figures if "loss" in logs else logs, start_time)

    def _seed(self) -> int:
        """Of the order in which PCGrad takes the languages: another one at every step, the same after a resume."""
        return seed_for(self.args.seed, self.state.global_step, "surgery")

    def _keep_apart(self, language: int) -> None:
        kept = self._apart.setdefault(language, {})
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                kept[name] = kept[name].add_(parameter.grad) if name in kept else parameter.grad
                parameter.grad = None


def place_resolved(
    parameters: Mapping[str, torch.nn.Parameter], apart: Mapping[int, Mapping[str, Tensor]], method: str, seed: int
) -> dict[str, float]:
    """Put the merged gradient of every bucket in its place. apart: language -> parameter -> its share of the step's gradient.

    Where no languages conflict, PCGrad leaves the sum of the shares as it is, which is the gradient without surgery. Shares that are not
    finite are summed as they are: what looks at gradients then sees them. Returns figures: `surgery/conflicts`, the share of (bucket, two languages)
    whose gradients point apart, `surgery/cosine` of the merged gradient and the sum (0 where the method leaves nothing of it), and
    `surgery/unsolved`, the share of buckets in which the method finds no weights: they keep the sum.
    """
    shares = [apart[language] for language in sorted(apart)]
    buckets: dict[str, list[str]] = {}
    for name in parameters:
        if any(name in share for share in shares):
            buckets.setdefault(name.split(_FACTOR)[0], []).append(name)
    grams = [
        torch.stack([_inner([share.get(name) for share in shares]) for name in names]) for names in buckets.values()
    ]
    gram_KLL = torch.stack([gram.sum(dim=0) for gram in grams]).cpu()
    plain_KL = torch.ones(gram_KLL.shape[:2], dtype=torch.float64)
    weight_KL, unsolved = plain_KL, 0.0
    if len(shares) > 1 and bool(torch.isfinite(gram_KLL).all()):
        weight_KL = _weights(gram_KLL, surgery(method, len(shares), seed, repeats=1))
        if method not in SUMMED:  # the mean of those that have a gradient at all
            weight_KL = weight_KL * (gram_KLL.diagonal(dim1=-2, dim2=-1) > 0).sum(dim=-1, keepdim=True)
        lost_K1 = weight_KL.isnan().any(dim=-1, keepdim=True)
        weight_KL, unsolved = torch.where(lost_K1, plain_KL, weight_KL), float(lost_K1.double().mean())
    for names, weight_L in zip(buckets.values(), weight_KL.tolist(), strict=True):
        for name in names:
            weighted = [weight * share[name] for weight, share in zip(weight_L, shares, strict=True) if name in share]
            parameters[name].grad = torch.stack(weighted).sum(dim=0)
    return _figures(gram_KLL, weight_KL, plain_KL) | {"surgery/unsolved": unsolved}


def _weights(gram_KLL: Tensor, method: Surgery) -> Tensor:
    """[K, L]; NaN in a bucket whose gradients have no weights."""
    try:
        return method(gram_KLL)
    except UserError:
        return torch.stack([_weights_or_nan(gram_LL, method) for gram_LL in gram_KLL])


def _weights_or_nan(gram_LL: Tensor, method: Surgery) -> Tensor:
    try:
        return method(gram_LL)
    except UserError:
        return torch.full((len(gram_LL),), torch.nan, dtype=torch.float64)


def _inner(gradients: list[Tensor | None]) -> Tensor:
    """[L, L] float64: inner products of one parameter's gradients; one that is missing is 0."""
    there = next(gradient for gradient in gradients if gradient is not None)
    flat_LP = torch.stack([(torch.zeros_like(there) if g is None else g).flatten().double() for g in gradients])
    return flat_LP @ flat_LP.T


def _figures(gram_KLL: Tensor, weight_KL: Tensor, plain_KL: Tensor) -> dict[str, float]:
    def product(left_KL: Tensor, right_KL: Tensor) -> float:
        return float(torch.einsum("kl,klm,km->", left_KL, gram_KLL, right_KL))

    languages = gram_KLL.shape[-1]
    above = torch.triu_indices(languages, languages, offset=1)
    between = gram_KLL[:, above[0], above[1]]
    lengths = (max(product(weight_KL, weight_KL), 0.0) * max(product(plain_KL, plain_KL), 0.0)) ** 0.5
    return {
        "surgery/conflicts": float((between < 0).double().mean()) if between.numel() else 0.0,
        "surgery/cosine": min(max(product(weight_KL, plain_KL) / lengths, -1.0), 1.0)
        if lengths > 0
        else float(not product(plain_KL, plain_KL) > 0),
    }


@dataclass(frozen=True)
class LanguageSurgeryPhase(Phase):
    """Resolved as `train.language_surgery` says."""

    kind: type[PairTrainer] = LanguageSurgeryTrainer

    def options(self, session: Session, model: PreTrainedModel) -> dict[str, Any]:
        """The method."""
        return {"method": session.train.language_surgery}


def with_languages(pairs: TrainingPairs) -> TrainingPairs:
    """The pairs with the number of their language among those there are."""
    number = {language: position for position, language in enumerate(sorted(set(pairs.languages)))}
    return pairs.with_column(COLUMN, pa.array([number[language] for language in pairs.languages], pa.int32()))
