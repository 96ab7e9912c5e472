"""Reward models behind a vLLM server (`vllm serve MODEL --runner pooling`): its /classify, raw logits of every head."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import openai

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, ModelRef, Share
from stages.engines.base import Completion, Request
from stages.engines.openai import OpenAIEngine
from stages.engines.openai_wire import Classes, Malformed, post, read
from stages.models.strict import skeleton
from stages.models.text_model import classifier_class, labels_of
from stages.text.render import Renderer, load_renderer

_START = "Start it as `vllm serve MODEL --runner pooling`, or judge with judge.engine.kind: vllm or transformers."


class OpenAIRewardEngine(OpenAIEngine):
    """A sequence classifier's logits, one a head, of whole conversations; see `OpenAIEngine`. Raises UserError for a model without a trained
    head, and a server that is no vLLM: others have no such address."""

    def __init__(
        self, model: ModelRef, config: RunConfig, renderer: Renderer, share: Callable[[], Share] = Share
    ) -> None:
        made = skeleton(model, config.model.trust_remote_code, classifier_class)
        super().__init__(model, config, renderer, share)
        if not self._is_vllm:
            raise self._no_classifier()
        self.labels = labels_of(made.config)
        self._url = os.path.expandvars(self._base_url).rstrip("/").removesuffix("/v1") + "/classify"

    def _send(self, request: Request) -> Any:
        body = {"model": self._model, "input": request.prompt_ids, "use_activation": False}
        return post(self._client, self._url, body)

    def _completion(self, request: Request, response: Any) -> Completion:
        values = tuple(read(response, Classes).data[0].probs)
        if len(values) != len(self.labels):
            raise Malformed(f"it has {len(values)} scores, and the model has {len(self.labels)} heads")
        if not all(map(math.isfinite, values)):
            raise Malformed("a score is not finite")
        return Completion(request.id, "", [], 0, "length", values=values)

    def _unusable(self, error: openai.OpenAIError) -> UserError:
        return self._no_classifier() if isinstance(error, openai.NotFoundError) else super()._unusable(error)

    def _no_classifier(self) -> UserError:
        return UserError(
            "The inference server does not classify: it has no /classify, as a vLLM server of a reward model has",
            where=f"engine.base_url: {self._base_url}",
            fix=_START,
        )


def load(model: ModelRef, config: RunConfig, ctx: Context | None) -> OpenAIRewardEngine:
    """See `stages.engines.base.Load`."""
    renderer = load_renderer(model, config.text, config.model.trust_remote_code)
    return OpenAIRewardEngine(model, config, renderer, ctx.share if ctx is not None else Share)
