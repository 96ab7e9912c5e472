"""The card of the sft model: what it was made from, on what, how."""

from __future__ import annotations

from collections.abc import Mapping

from schemas.config import RunConfig
from stages.text.markdown import escape
from stages.train.batches import BatchPlan
from stages.train.card_page import card_page, common_settings


def sft_card(config: RunConfig, base_name: str, per_language: Mapping[str, int], plan: BatchPlan) -> str:
    """Markdown, see `card_page`."""
    sft = config.sft
    sources = escape(", ".join(source.path for source in sft.sources))
    settings = {
        **common_settings(sft, "adamw", f"{plan.warmup_steps} warm-up steps"),
        "optimizer steps": str(plan.steps),
        "numbers": config.model.dtype,
        "seed": str(config.seed),
    }
    method = (
        "Cross-entropy of the answers' tokens, end of turn included, given everything before them; the mean over the answer"
        " tokens of an optimizer step. Trained with TRL's SFTTrainer, without packing."
    )
    return card_page(
        config,
        f"{config.name}, before round 0",
        "sft",
        [f"{escape(base_name)}, fine-tuned on conversations from {sources}."],
        "conversations",
        "Conversations",
        per_language,
        settings,
        [method],
    )
