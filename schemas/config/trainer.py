"""What every training is told, whatever its loss: the sections `sft` and `train` add to it."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from schemas.config.base import Section, execution, semantic


class LoraConfig(Section):
    """LoRA adapters (PEFT)."""

    r: int = semantic(16, "rank", ge=1)
    alpha: int = semantic(32, "scale is alpha / r", ge=1)
    dropout: float = semantic(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | list[str] = semantic("all-linear", "module names, or all-linear")


class TrainerConfig(Section):
    """One training of the policy. section: its key in the config; rows: what an epoch is made of, for people."""

    section: ClassVar[str]
    rows: ClassVar[str]

    method: Literal["lora", "full"] = semantic("lora", "adapters (merged at the end) or all weights")
    lora: LoraConfig = semantic(LoraConfig(), "adapter settings")
    learning_rate: float = semantic(5e-6, "peak learning rate", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = semantic("cosine", "learning-rate schedule")
    warmup_ratio: float = semantic(0.1, "share of steps that warm up", ge=0, lt=1)
    weight_decay: float = semantic(0.0, "AdamW weight decay", ge=0)
    max_grad_norm: float = semantic(1.0, "gradient clipping", gt=0)
    epochs: float = semantic(1.0, "passes over the rows", gt=0)
    max_steps: int = semantic(-1, "stop after so many optimizer steps; -1: by epochs", ge=-1)
    batch_size: int = semantic(32, "rows (pairs, conversations) per optimizer step, over all devices", ge=1)
    micro_batch_size: int = execution(2, "rows per forward", ge=1)
    gradient_checkpointing: bool = execution(False, "recompute activations: less memory, slower")
    save_steps: int = execution(50, "steps between checkpoints", ge=1)
    report_to: list[str] = execution([], "TRL loggers: tensorboard, trackio, wandb")

    @model_validator(mode="after")
    def _lora(self) -> Self:
        if self.method == "full" and self.lora != LoraConfig():
            raise ValueError(
                f"{self.section}.lora is set and {self.section}.method is full: use method: lora, or leave"
                f" {self.section}.lora out"
            )
        return self

    @property
    def window(self) -> int:
        """Optimizer steps that only count together: a training of fewer does nothing."""
        return 1

    @property
    def shards(self) -> bool:
        """Whether several processes cut what is trained over themselves."""
        return False
