"""Config of the sft stage."""

from __future__ import annotations

from typing import ClassVar, Literal

from schemas.config.base import Section, semantic
from schemas.config.sources import Source
from schemas.config.trainer import TrainerConfig


class ConversationFields(Section):
    """Names of the columns in the source: `messages`, or `prompt` and `completion`."""

    messages: str = semantic("messages", "conversation as a list of messages ending in an answer")
    prompt: str = semantic("prompt", "without a conversation: text, or messages ending in a user turn")
    completion: str = semantic("completion", "without a conversation: the answer, text or one message")
    system: str | None = semantic(None, "system message")
    language: str | None = semantic("language", "BCP 47 code; rows without it take the source's language")


class ConversationSource(Source):
    """A data set of conversations."""

    fields: ConversationFields = semantic(ConversationFields(), "column names")


class SftConfig(TrainerConfig):
    """Sft stage (TRL SFTTrainer): fine-tunes model.policy before round 0."""

    section: ClassVar[str] = "sft"
    rows: ClassVar[str] = "conversations"

    sources: list[ConversationSource] = semantic([], "conversations to learn from; none: no sft stage")
    method: Literal["lora", "full"] = semantic("full", "adapters (merged at the end) or all weights")
    learning_rate: float = semantic(2e-5, "peak learning rate", gt=0)

    @property
    def on(self) -> bool:
        """Whether the run has the stage."""
        return bool(self.sources)
