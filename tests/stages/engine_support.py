"""What tests of engines, generate and judge share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config import RunConfig
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Context, ModelRef, Part, Shard
from stages.engines.base import Completion, Request


@dataclass
class Recorder:
    """A Progress that remembers."""

    notes: list[str] = field(default_factory=list)
    done: int = 0
    rates: dict[str, float] = field(default_factory=dict)

    def total(self, amount: int, unit: str) -> None:
        pass

    def advance(self, amount: int = 1, **rates: float) -> None:
        self.done += amount
        self.rates |= rates

    def note(self, message: str) -> None:
        self.notes.append(message)


def prompts(texts: list[str], split: str = "train", language: str = "en") -> list[dict[str, Any]]:
    """Rows of the prompts table."""
    return [
        {
            "prompt_id": content_id(language, text, number),
            "group_id": f"g{number}",
            "language": language,
            "split": split,
            "messages": [{"role": "user", "content": text}],
            "language_confidence": 1.0,
            "source": "test",
            "source_row": number,
        }
        for number, text in enumerate(texts)
    ]


def answers(asked: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    """Rows of the candidates table: answers to the prompts, as many to each, prompt after prompt."""
    each = len(texts) // len(asked)
    return [
        {
            "candidate_id": content_id(number, text),
            "prompt_id": asked[number // each]["prompt_id"],
            "round": 0,
            "index": number % each,
            "text": text,
            "n_tokens": 3,
            "finish_reason": "stop",
            "language": "en",
            "detected_language": "en",
            "language_confidence": 1.0,
        }
        for number, text in enumerate(texts)
    ]


def shards_of(rows: list[dict[str, Any]], table: str, size: int) -> Iterator[Shard]:
    for index, start in enumerate(range(0, len(rows), size)):
        yield Shard(index, pa.Table.from_pylist(rows[start : start + size], schema=TABLES[table].schema))


def joined(parts: list[Part], table: str) -> list[dict[str, Any]]:
    return [row for part in sorted(parts, key=lambda part: part.index) for row in part.tables[table].to_pylist()]


class Scripted:
    """A real engine's renderer with scripted completions; remembers the requests."""

    def __init__(self, real: Any, answer: Callable[[Request], Completion]) -> None:
        self.renderer, self.context_length, self._answer = real.renderer, real.context_length, answer
        self.requests: list[Request] = []

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        for request in requests:
            self.requests.append(request)
            yield self._answer(request)


def make_context(
    model: Path, /, round: int = 0, inputs: dict[str, list[Path]] | None = None, **sections: Any
) -> Context:
    """A context in reference mode; `sections` replace those of the config."""
    config = {
        "name": "t",
        "seed": 4,
        "languages": {"seen": ["en", "de"]},
        "model": {"policy": "tiny", "dtype": "float32"},
        "text": {"max_length": 128},
        "engine": {"kind": "transformers", "batch_size": 4},
        "prompts": {"sources": [{"path": "unused.jsonl"}]},
        "generate": {"candidates": 3, "sampling": {"max_tokens": 8}},
        "execution": {"deterministic": True, "device": "cpu"},
        **sections,
    }
    ref = ModelRef("tiny", model, "digest")
    return Context(RunConfig.model_validate(config), round, inputs or {}, {"policy": ref, "judge": ref}, Recorder())
