"""The page that the model cards of the train and sft stages share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from stages.text.language import UNKNOWN
from stages.text.markdown import escape


def common_settings(section: TrainerConfig, optimizer: str, warm_up: str) -> dict[str, str]:
    """Rows of the table of settings."""
    lora = section.lora
    return {
        "method": f"LoRA, rank {lora.r}, alpha {lora.alpha}, dropout {lora.dropout}"
        if section.method == "lora"
        else "all weights (float32 masters)",
        "optimizer": optimizer,
        "learning rate": f"{section.learning_rate:g}, {section.schedule}, {warm_up}",
        "weight decay": f"{section.weight_decay:g}",
        "gradient clipping": f"{section.max_grad_norm:g}",
        f"{section.rows} per step": str(section.batch_size),
    }


def card_page(
    config: RunConfig,
    title: str,
    tag: str,
    about: Sequence[str],
    unit: str,
    heading: str,
    per_language: Mapping[str, int],
    settings: Mapping[str, str],
    method: Sequence[str],
) -> str:
    """Markdown with a YAML header that Hugging Face reads. Title, languages and values of settings are escaped here: they come
    from the user's files; about and method are Markdown."""
    languages = sorted(per_language)
    codes = dict.fromkeys(language.partition("-")[0] for language in languages if language != UNKNOWN)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{tag}, trl, congrad]",
        *(["language:", *(f"- {json.dumps(code)}" for code in codes)] if codes else []),
        "---",
        "",
        f"# {escape(title)}",
        "",
        *([escape(config.banner), ""] if config.banner else []),
        *about,
        "",
        f"## {heading}",
        "",
        f"| language | {unit} |",
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
        *method,
        "",
    ]
    return "\n".join(lines)
