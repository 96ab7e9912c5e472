"""The card of the sft model: what it was made from, on what, how."""

from __future__ import annotations

from schemas.config import RunConfig
from stages.contract import ModelRef
from stages.text.markdown import escape
from stages.train.batches import BatchPlan
from stages.train.card_page import Page, card_page, common_settings, dtype_name, shown
from stages.train.seen import Seen


def sft_card(config: RunConfig, base: ModelRef, seen: Seen, plan: BatchPlan) -> str:
    """Markdown, see `card_page`."""
    sft = config.sft
    sources = escape(", ".join(source.path for source in sft.sources))
    settings = {
        **common_settings(sft, "adamw", f"{plan.warmup_steps} warm-up steps"),
        "optimizer steps": str(plan.steps),
        "numbers": dtype_name(config),
        "seed": str(config.seed),
    }
    method = (
        "Cross-entropy of the answers' tokens, end of turn included, given everything before them; the mean over the answer"
        " tokens of an optimizer step. Trained with TRL's SFTTrainer, without packing."
    )
    about = [f"{shown(base)}, fine-tuned on conversations from {sources}."]
    page = Page(f"{config.name}, before round 0", "sft", about, seen, settings, [method])
    return card_page(config, sft, base, sft.sources, page)
