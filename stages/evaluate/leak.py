"""What the model was, or in some round may be, trained on: nothing of it is evaluated.

Training rows are the curated pairs, what the sft stage learnt from and, so that the figures of all rounds are over the same items, every prompt and
pair of the train split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from stages.contract import Context
from stages.text.messages import comparable, spoken

IN_TRAINING = "in_training"
TRANSLATION = "translation_of_training"


@dataclass(frozen=True)
class TrainingRows:
    """prompt_ids, translation groups and normalised prompt texts of the training rows."""

    prompt_ids: set[str] = field(default_factory=set)
    group_ids: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)

    def overlap(self, prompt_id: str, group_id: str | None, messages: list[dict[str, str]]) -> str | None:
        """Why a row may not be evaluated: in_training (same prompt or text), translation_of_training (same group). group_id: None where
        it is a name of another data set's, which says nothing here."""
        if prompt_id in self.prompt_ids or prompt_text(messages) in self.texts:
            return IN_TRAINING
        return TRANSLATION if group_id in self.group_ids else None


def prompt_text(messages: list[dict[str, str]]) -> str:
    """What two prompts are compared by: system messages left out, case and white space levelled."""
    return comparable(spoken(messages))


def training_rows(ctx: Context) -> TrainingRows:
    """Read the training rows of `curated`, `pairs:0` and, when there are any, `prompts` and the `conversations` of sft."""
    rows = TrainingRows()
    _add(rows, ctx.scan("curated"), "prompt")
    _add(rows, ctx.scan("pairs:0").filter(pl.col("split") == "train"), "prompt")
    if ctx.inputs.get("prompts"):
        _add(rows, ctx.scan("prompts").filter(pl.col("split") == "train"), "messages")
    if ctx.inputs.get("conversations"):
        for row in _dicts(ctx.scan("conversations").select("messages")):
            messages = row["messages"]
            answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
            rows.texts.update(prompt_text(messages[:at]) for at in answers)
    return rows


def _add(rows: TrainingRows, frame: pl.LazyFrame, messages: str) -> None:
    for row in _dicts(frame.select("prompt_id", "group_id", pl.col(messages).alias("messages"))):
        rows.prompt_ids.add(row["prompt_id"])
        rows.group_ids.add(row["group_id"])
        rows.texts.add(prompt_text(row["messages"]))


def _dicts(frame: pl.LazyFrame) -> list[dict[str, Any]]:
    return frame.collect().to_dicts()
