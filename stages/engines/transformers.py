"""The transformers engine: for platforms without vLLM, for fast tests, and for bit-for-bit reproducible runs.

Suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from schemas.config import RunConfig
from stages.contract import Context, ModelRef
from stages.engines.base import Completion, Request, context_length, not_finite
from stages.engines.batches import BatchEngine
from stages.engines.sampling import RowSampler
from stages.models.device import device_of, dtype_of, free_memory
from stages.models.load import load_text_model, settle_threads
from stages.text.render import Renderer, load_renderer


class TransformersEngine(BatchEngine):
    """`generate` of transformers with our own seeded sampling; see `stages.engines.base.Engine`."""

    def __init__(self, model: ModelRef, config: RunConfig, renderer: Renderer, ctx: Context | None = None) -> None:
        super().__init__(config, ctx)
        self.renderer = renderer
        self._name, self._dtype = model.name, config.model.dtype
        self._device = device_of(config)
        settle_threads(config)
        self._model = load_text_model(model, dtype_of(config), self._device, config.model.trust_remote_code)
        self.context_length = context_length(self._model.config, config)
        ends = self._model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._stop_ids = sorted({*renderer.stop_ids, *ends})
        pad = renderer.tokenizer.pad_token_id
        self._pad_id = self._stop_ids[0] if pad is None else pad

    def close(self) -> None:
        """Drop the model."""
        del self._model
        free_memory()

    @torch.inference_mode()
    def run_batch(self, batch: list[Request]) -> Iterator[Completion]:
        width = max(len(request.prompt_ids) for request in batch)
        ids_BT = torch.tensor([[self._pad_id] * (width - len(r.prompt_ids)) + r.prompt_ids for r in batch])
        mask_BT = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch])
        scoring = bool(batch[0].score_tokens)
        watcher, draw = _Watcher(self, batch, width), _Draw(batch)
        output: Any = self._model.generate(
            input_ids=ids_BT.to(self._device),
            attention_mask=mask_BT.to(self._device),
            max_new_tokens=1 if scoring else max(request.sampling.max_tokens for request in batch),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self._stop_ids,
            pad_token_id=self._pad_id,
            logits_processor=[] if scoring else [draw],
            stopping_criteria=[watcher],
            return_dict_in_generate=True,
            output_logits=scoring,
        )
        if scoring:
            logprobs_BV = torch.log_softmax(output.logits[0].float(), dim=-1)
            for row, request in enumerate(batch):
                if torch.isnan(logprobs_BV[row]).any():
                    yield self._not_finite(request)
                    continue
                found = {token: float(logprobs_BV[row, token]) for token in request.score_tokens}
                yield Completion(request.id, "", [], 0, "length", found)
            return
        for row, (request, new_T) in enumerate(zip(batch, output.sequences[:, width:].tolist(), strict=True)):
            yield self._not_finite(request) if row in draw.broken else self._finish(request, new_T)

    def _not_finite(self, request: Request) -> Completion:
        return Completion(request.id, "", [], 0, "error", error=not_finite(self._name, self._dtype).what)

    def _finish(self, request: Request, new_T: list[int]) -> Completion:
        """Cut a row's padding, find why it ended."""
        limit = request.sampling.max_tokens
        reason, length = "length", min(limit, len(new_T))
        for position, token in enumerate(new_T[:limit]):
            if token in self._stop_ids:
                reason, length = "stop", position + 1
                break
            if self.stop_string_at(request, new_T[: position + 1]):
                reason, length = "stop", position + 1
                break
        text = self.renderer.decode(new_T[:length])
        cuts = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
        return Completion(request.id, text[: min(cuts)] if cuts else text, new_T[:length], length, reason)

    def stop_string_at(self, request: Request, new_T: list[int]) -> bool:
        """Whether a stop string is complete with the last of these tokens."""
        if not request.sampling.stop:
            return False
        longest = max(len(stop.encode()) for stop in request.sampling.stop)
        tail = self.renderer.decode(new_T[-(longest + 4) :])
        return any(stop in tail for stop in request.sampling.stop)

    def ended(self, request: Request, new_T: list[int]) -> bool:
        """Whether a row needs no further token, its end-of-turn token aside."""
        return len(new_T) >= request.sampling.max_tokens or self.stop_string_at(request, new_T)


class _Draw(LogitsProcessor):
    """Makes each row's seeded draw the only possible token, so that greedy decoding takes it."""

    def __init__(self, batch: list[Request]) -> None:
        self.broken: set[int] = set()
        """Rows whose logits were not numbers, or too large for the model's precision."""
        self._sampler = RowSampler([request.sampling for request in batch], [request.seed for request in batch])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bad := (~torch.isfinite(scores.amax(dim=1))).nonzero()[:, 0].tolist():  # NaN and infinity win a maximum
            self.broken |= set(bad)
            scores = scores.index_fill(0, torch.tensor(bad, device=scores.device), 0.0)
        picks_B = self._sampler(scores)
        return torch.full_like(scores, float("-inf")).scatter_(1, picks_B[:, None], 0.0)


class _Watcher(StoppingCriteria):
    """Ends rows at their own max_tokens and stop strings."""

    def __init__(self, engine: TransformersEngine, batch: list[Request], width: int) -> None:
        self._engine, self._batch, self._width = engine, batch, width
        self._done = [False] * len(batch)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        for row, new_T in enumerate(input_ids[:, self._width :].tolist()):
            self._done[row] = self._done[row] or self._engine.ended(self._batch[row], new_T)
        return torch.tensor(self._done, device=input_ids.device)


def load(model: ModelRef, config: RunConfig, ctx: Context | None) -> TransformersEngine:
    """See `stages.engines.base.Load`."""
    return TransformersEngine(model, config, load_renderer(model, config.text, config.model.trust_remote_code), ctx)
