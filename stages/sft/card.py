"""The card of the sft model: what it was made from, on what, how."""

from __future__ import annotations

import json
from collections.abc import Mapping

from schemas.config import RunConfig
from stages.text.language import UNKNOWN
from stages.text.markdown import escape
from stages.train.batches import BatchPlan


def sft_card(config: RunConfig, base_name: str, per_language: Mapping[str, int], plan: BatchPlan) -> str:
    """Markdown with a YAML header that Hugging Face reads. Names are escaped: they come from the user's files."""
    sft, languages = config.sft, sorted(per_language)
    codes = dict.fromkeys(language.partition("-")[0] for language in languages if language != UNKNOWN)
    settings = {
        "method": f"LoRA, rank {sft.lora.r}, alpha {sft.lora.alpha}, dropout {sft.lora.dropout}"
        if sft.method == "lora"
        else "all weights (float32 masters)",
        "optimizer": "adamw",
        "learning rate": f"{sft.learning_rate:g}, {sft.schedule}, {plan.warmup_steps} warm-up steps",
        "weight decay": f"{sft.weight_decay:g}",
        "gradient clipping": f"{sft.max_grad_norm:g}",
        "conversations per step": str(plan.micro_batch * plan.accumulation),
        "optimizer steps": str(plan.steps),
        "numbers": config.model.dtype,
        "seed": str(config.seed),
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [sft, trl, congrad]",
        *(["language:", *(f"- {json.dumps(code)}" for code in codes)] if codes else []),
        "---",
        "",
        f"# {escape(config.name)}, before round 0",
        "",
        *([escape(config.banner), ""] if config.banner else []),
        f"{escape(base_name)}, fine-tuned on conversations from {escape(', '.join(s.path for s in sft.sources))}.",
        "",
        "## Conversations",
        "",
        "| language | conversations |",
        "| --- | ---: |",
        *(f"| {escape(language)} | {per_language[language]} |" for language in languages),
        f"| all | {sum(per_language.values())} |",
        "",
        "## Settings",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {escape(value)} |" for name, value in settings.items()),
        "",
        "## Method",
        "",
        "Cross-entropy of the answers' tokens, end of turn included, given everything before them; the mean over the answer"
        " tokens of an optimizer step. Trained with TRL's SFTTrainer, without packing.",
        "",
    ]
    return "\n".join(lines)
