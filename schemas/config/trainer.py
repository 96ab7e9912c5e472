"""What every training is told, whatever its loss: the sections `sft` and `train` add to it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from schemas.config.base import Section, execution, semantic
from schemas.config.loggers import LOGGERS


class LoraConfig(Section):
    """LoRA adapters (PEFT)."""

    r: int = semantic(16, "rank", ge=1)
    alpha: int = semantic(32, "scale is alpha / r", ge=1)
    dropout: float = semantic(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | list[str] = semantic(
        "all-linear", "module names as they end (q_proj, self_attn.q_proj), or all-linear", min_length=1
    )


class TrainerConfig(Section):
    """One training of the policy. section: its key in the config; rows: what an epoch is made of, for people."""

    section: ClassVar[str]
    rows: ClassVar[str]

    method: Literal["lora", "full"] = semantic("lora", "adapters (merged at the end) or all weights")
    lora: LoraConfig = semantic(LoraConfig(), "adapter settings", used_when={".method": "lora"})
    learning_rate: float = semantic(5e-6, "peak learning rate", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = semantic("cosine", "learning-rate schedule")
    warmup_ratio: float = semantic(0.1, "share of steps that warm up", ge=0, lt=1)
    weight_decay: float = semantic(0.0, "AdamW weight decay", ge=0)
    max_grad_norm: float = semantic(1.0, "gradient clipping", gt=0)
    epochs: float = semantic(1.0, "passes over the rows", used_when={".max_steps": -1}, gt=0)
    max_steps: int = semantic(
        -1, "optimizer steps, however many passes that is, instead of epochs; -1: by epochs (as in transformers)", ge=-1
    )
    batch_size: int = semantic(32, "rows (pairs, conversations) per optimizer step, over all devices", ge=1)
    micro_batch_size: int = execution(2, "rows per forward", ge=1)
    gradient_checkpointing: bool = execution(False, "recompute activations: less memory, slower")
    save_steps: int = execution(50, "steps between checkpoints", ge=1)
    report_to: list[str] = execution([], f"loggers, each a package of its own: {', '.join(LOGGERS)}")

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.max_steps == 0:
            raise ValueError(
                f"{self.section}.max_steps is 0: nothing would be trained; use -1 to train by epochs, or give a number of steps"
            )
        return self

    @model_validator(mode="after")
    def _loggers(self) -> Self:
        for name in self.report_to:
            if name not in LOGGERS:
                near = get_close_matches(name, LOGGERS, 1)
                raise ValueError(
                    f"{self.section}.report_to: {name!r} is not a logger that transformers knows"
                    + (f" (did you mean {near[0]}?)" if near else "")
                    + f": use {', '.join(LOGGERS)}, or [] for none"
                )
        return self

    @property
    def parts(self) -> Mapping[str, TrainerConfig]:
        """What is trained one after another, as people call it, and what each is told."""
        return {"the run": self}

    @property
    def window(self) -> int:
        """Optimizer steps that only count together: a training of fewer does nothing."""
        return 1

    @property
    def names_targets(self) -> bool:
        """Whether it says which layers get adapters; a name may be wrong."""
        return self.method == "lora" and self.lora.target_modules != "all-linear"

    def copies(self, machines: int, processes: int) -> int:
        """Of what is trained, over so many processes on each of so many machines, where those that share one cut it over themselves; 0: each
        process has its own."""
        return 0
