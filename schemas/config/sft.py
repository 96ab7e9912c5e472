"""Config of the sft stage."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from schemas.config.base import Section, execution, semantic
from schemas.config.sources import Source
from schemas.config.training import LoraConfig


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


class SftConfig(Section):
    """Sft stage (TRL SFTTrainer): fine-tunes model.policy before round 0; part of a run that names sources."""

    sources: list[ConversationSource] = semantic([], "conversations to learn from; none: no sft stage")
    method: Literal["lora", "full"] = semantic("full", "adapters (merged at the end) or all weights")
    lora: LoraConfig = semantic(LoraConfig(), "adapter settings")
    learning_rate: float = semantic(2e-5, "peak learning rate", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = semantic("cosine", "learning-rate schedule")
    warmup_ratio: float = semantic(0.1, "share of steps that warm up", ge=0, lt=1)
    weight_decay: float = semantic(0.0, "AdamW weight decay", ge=0)
    max_grad_norm: float = semantic(1.0, "gradient clipping", gt=0)
    epochs: float = semantic(1.0, "passes over the conversations", gt=0)
    max_steps: int = semantic(-1, "stop after so many optimizer steps; -1: by epochs", ge=-1)
    batch_size: int = semantic(32, "conversations per optimizer step, over all devices", ge=1)
    micro_batch_size: int = execution(2, "conversations per forward", ge=1)
    gradient_checkpointing: bool = execution(False, "recompute activations: less memory, slower")
    save_steps: int = execution(50, "steps between checkpoints", ge=1)
    report_to: list[str] = execution([], "TRL loggers: tensorboard, trackio, wandb")

    @model_validator(mode="after")
    def _lora(self) -> SftConfig:
        if self.method == "full" and self.lora != LoraConfig():
            raise ValueError("sft.lora is set and sft.method is full: use method: lora, or leave sft.lora out")
        return self

    @property
    def on(self) -> bool:
        """Whether the run has the stage."""
        return bool(self.sources)
