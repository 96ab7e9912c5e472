"""Reward models on vLLM: its pooling runner, raw logits of every head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from schemas.config import RunConfig
from stages.contract import Context, ModelRef
from stages.engines.base import Completion, Request, not_finite
from stages.engines.vllm import VllmEngine
from stages.models.strict import skeleton
from stages.models.text_model import classifier_class, labels_of
from stages.text.render import load_renderer


class VllmRewardEngine(VllmEngine):
    """A sequence classifier's logits, one a head, of whole conversations; see `VllmEngine`."""

    arguments: ClassVar[Mapping[str, Any]] = {"runner": "pooling", "convert": "classify"}

    def check(self, model: ModelRef, config: RunConfig) -> None:
        """See `VllmEngine.check`."""
        skeleton(model, config.model.trust_remote_code, classifier_class)

    def labels_of(self, hf_config: Any) -> tuple[str, ...]:
        """See `Engine.labels`."""
        return labels_of(hf_config)

    def _parameters(self, request: Request) -> Any:
        return self._vllm.PoolingParams(task="classify", use_activation=False)

    def _completion(self, request: Request, output: Any) -> Completion:
        values = tuple(map(float, output.outputs.data.double().flatten().tolist()))
        if not all(map(math.isfinite, values)):
            return Completion(request.id, "", [], 0, "error", error=not_finite(self._name, self._dtype).what)
        return Completion(request.id, "", [], 0, "length", values=values)


def load(model: ModelRef, config: RunConfig, ctx: Context | None) -> VllmRewardEngine:
    """See `stages.engines.base.Load`; called in the engine's process."""
    return VllmRewardEngine(model, config, load_renderer(model, config.text, config.model.trust_remote_code))
