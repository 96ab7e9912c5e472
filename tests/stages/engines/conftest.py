"""A config, a renderer and requests for the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_support import Recorder

from schemas.config import RunConfig
from schemas.config.model import Sampling
from stages.contract import ModelRef
from stages.engines.base import Request
from stages.text.render import Renderer, load_renderer


@pytest.fixture
def model(tiny_model: Path) -> ModelRef:
    return ModelRef("tiny", tiny_model, "digest")


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    def make(execution: dict[str, Any] | None = None, dtype: str = "float32", **engine: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "name": "t",
                "languages": {"seen": ["en"]},
                "model": {"policy": "tiny", "dtype": dtype},
                "text": {"max_length": 256},
                "prompts": {"sources": [{"path": "unused.jsonl"}]},
                "engine": engine if "kind" in engine else {"kind": "transformers", "batch_size": 4, **engine},
                "execution": execution or {"device": "cpu"},
            }
        )

    return make


@pytest.fixture
def renderer(model: ModelRef, make_config: Callable[..., RunConfig]) -> Renderer:
    return load_renderer(model, make_config().text)


@pytest.fixture
def ask(renderer: Renderer) -> Callable[..., Request]:
    def make(
        id: str, text: str, seed: int = 0, score: tuple[int, ...] = (), group: int = 0, **sampling: Any
    ) -> Request:
        ids = renderer.prompt_ids([{"role": "user", "content": text}])
        return Request(id, ids, Sampling(**{"max_tokens": 12, **sampling}), seed, score, group)

    return make


@pytest.fixture
def progress() -> Recorder:
    return Recorder()
