"""What transformers says of a given text: rewards by a sequence classifier, log-likelihoods by a language model.

Rows are padded on the right, so that a row's values do not depend on its batch: to 1e-5 of their size in float32, 2e-2 in
bfloat16, where a batch's shape alone changes the last digits. Suffixes: B rows, T tokens, K heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, ModelRef
from stages.engines.base import Completion, Request, context_length, not_finite
from stages.engines.batches import BatchEngine
from stages.gradients.logprobs import Head, check_head, completion_logprobs
from stages.gradients.rows import BatchRow, RowBatch
from stages.models.device import device_of, dtype_of, free_memory
from stages.models.load import load_classifier, load_text_model, settle_threads
from stages.models.text_model import labels_of
from stages.text.render import Renderer, load_renderer


class _ScoringEngine(BatchEngine):
    _model: Any

    def __init__(self, model: ModelRef, config: RunConfig, renderer: Renderer, ctx: Context | None) -> None:
        super().__init__(config, ctx)
        self.renderer = renderer
        self._name, self._dtype = model.name, config.model.dtype
        self._device = device_of(config)
        settle_threads(config)

    def close(self) -> None:
        """Drop the model."""
        del self._model
        free_memory()

    def _values(self, request: Request, values: Iterable[float]) -> Completion:
        found = tuple(values)
        if not all(map(math.isfinite, found)):
            return Completion(request.id, "", [], 0, "error", error=not_finite(self._name, self._dtype).what)
        return Completion(request.id, "", [], 0, "length", values=found)


class RewardEngine(_ScoringEngine):
    """A sequence classifier's logits, one a head, of whole conversations; see `stages.engines.base.Engine`."""

    def __init__(self, model: ModelRef, config: RunConfig, renderer: Renderer, ctx: Context | None = None) -> None:
        super().__init__(model, config, renderer, ctx)
        self._model = load_classifier(model, dtype_of(config), self._device, config.model.trust_remote_code)
        self.context_length = context_length(self._model.config, config)
        self.labels = labels_of(self._model.config)
        self._text_config = self._model.config.get_text_config()
        self._pad_id = self._text_config.pad_token_id

    @torch.inference_mode()
    def run_batch(self, batch: list[Request]) -> Iterator[Completion]:
        """See `BatchEngine.run_batch`."""
        width = max(len(request.prompt_ids) for request in batch)
        # Decoders read the reward at the last token that is no padding, which they tell by its id; one without an id for it
        # gets one that no row has.
        pad = self._pad_id
        if pad is None:
            taken = {token for request in batch for token in request.prompt_ids}
            pad = next(token for token in range(len(taken) + 1) if token not in taken)
            self._text_config.pad_token_id = self._model.config.pad_token_id = pad
        ids_BT = torch.tensor([r.prompt_ids + [pad] * (width - len(r.prompt_ids)) for r in batch])
        mask_BT = torch.tensor([[1] * len(r.prompt_ids) + [0] * (width - len(r.prompt_ids)) for r in batch])
        logits_BK = self._model(
            input_ids=ids_BT.to(self._device), attention_mask=mask_BT.to(self._device), return_dict=True
        ).logits
        for request, row in zip(batch, logits_BK.double().cpu().tolist(), strict=True):
            yield self._values(request, row)


class LoglikEngine(_ScoringEngine):
    """log p(target | prompt), summed over the target's tokens; see `stages.engines.base.Engine`."""

    def __init__(self, model: ModelRef, config: RunConfig, renderer: Renderer, ctx: Context | None = None) -> None:
        super().__init__(model, config, renderer, ctx)
        self._model = load_text_model(model, dtype_of(config), self._device, config.model.trust_remote_code)
        try:
            check_head(self._model)
        except ValueError as error:
            raise UserError(f"{model.name} cannot be scored: {error}", where="judge.reference") from error
        self._head = Head.of(self._model)
        self.context_length = context_length(self._model.config, config)

    @torch.inference_mode()
    def run_batch(self, batch: list[Request]) -> Iterator[Completion]:
        """See `BatchEngine.run_batch`."""
        rows = RowBatch.build([BatchRow(tuple(r.prompt_ids), r.target_ids) for r in batch], self._device)
        values_BT = completion_logprobs(self._model, rows, self._head)
        for request, row_T in zip(batch, values_BT, strict=True):
            yield self._values(request, [float(row_T[: len(request.target_ids)].double().sum())])


def load_reward(model: ModelRef, config: RunConfig, ctx: Context | None) -> RewardEngine:
    """See `stages.engines.base.Load`."""
    return RewardEngine(model, config, load_renderer(model, config.text, config.model.trust_remote_code), ctx)


def load_loglik(model: ModelRef, config: RunConfig, ctx: Context | None) -> LoglikEngine:
    """See `stages.engines.base.Load`."""
    return LoglikEngine(model, config, load_renderer(model, config.text, config.model.trust_remote_code), ctx)
