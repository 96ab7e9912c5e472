"""A context of the sft stage on the tiny model, from conversations on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.config import RunConfig
from stages.contract import Account, Context, ModelRef
from stages.sft.stage import Sft
from tests.stages.stage_context import collect


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Recorder:
    """A Progress that remembers, asks to stop after `stop_at` steps, and dies after `die_at`."""

    stop_at: int | None = None
    die_at: int | None = None
    done: int = 0
    units: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)

    def total(self, amount: int, unit: str) -> None:
        self.units.append((amount, unit))

    def advance(self, amount: int = 1, **rates: float) -> None:
        self.done += amount
        self.rates.append(rates)
        if amount and self.done == self.die_at:
            raise Killed

    def note(self, message: str) -> None:
        self.notes.append(message)

    def stop(self) -> bool:
        return self.stop_at is not None and self.done >= self.stop_at


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation: user, assistant, user, ..."""
    found = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *found] if system else found


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": turns("What is rain?", "Water that falls."), "language": "en"},
    {"messages": turns("Name a river.", "The Rhine.", "Another?", "The Nile, far longer.", system="Be short.")},
    {"messages": turns("Was ist Regen?", "Wasser, das vom Himmel fällt."), "language": "de"},
    {"prompt": "2 + 2?", "completion": "4"},
    {"prompt": turns("Count.", "How far?", "To two."), "completion": [{"role": "assistant", "content": "1, 2"}]},
]


class Bench:
    """Writes sources and makes contexts. model: the folder the run starts from."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model

    def write(self, rows: list[dict[str, Any]]) -> Path:
        path = self.root / "talks.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return path

    def context(
        self,
        rows: list[dict[str, Any]] | None = None,
        folder: str = "sft",
        progress: Recorder | None = None,
        text: dict[str, Any] | None = None,
        **sft: Any,
    ) -> Context:
        path = self.write(CONVERSATIONS if rows is None else rows)
        config = RunConfig.model_validate(
            {
                "name": "t",
                "languages": {"seen": ["en", "de"]},
                "model": {"policy": str(self.model), "dtype": "float32"},
                "engine": {"kind": "transformers"},
                "prompts": {"sources": [{"path": "unused.jsonl"}]},
                "text": {"max_length": 512} | (text or {}),
                "execution": {"deterministic": True},
                "sft": {
                    "sources": [{"path": str(path)}],
                    "batch_size": 2,
                    "micro_batch_size": 1,
                    **({} if "max_steps" in sft else {"epochs": 2}),
                    "learning_rate": 1e-3,
                    "save_steps": 1,
                }
                | sft,
            }
        )
        progress = progress or Recorder()
        (self.root / folder).mkdir(exist_ok=True)
        return Context(
            config=config,
            round=0,
            inputs={},
            models={"start": ModelRef("tiny", self.model, "digest-of-tiny")},
            progress=progress,
            folder=self.root / folder,
            stop=progress.stop,
        )

    @staticmethod
    def run(ctx: Context) -> tuple[dict[str, list[dict[str, Any]]], Account]:
        """(rows of both tables, the account)."""
        tables, account = collect(Sft(), ctx)
        return {name: table.to_pylist() for name, table in tables.items()}, account
