"""The page that the model cards of the train and sft stages share, with the header Hugging Face reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from schemas.config import RunConfig
from schemas.config.sources import Source
from schemas.config.trainer import TrainerConfig
from stages.contract import ModelRef
from stages.models.device import dtype_of
from stages.sources import hub_ids
from stages.text.codes import hub_codes
from stages.text.markdown import escape
from stages.train.seen import Seen


@dataclass(frozen=True)
class Page:
    """What a card says. about and method are Markdown; title, and the values of settings, are escaped by `card_page`."""

    title: str
    tag: str
    about: Sequence[str]
    seen: Seen
    settings: Mapping[str, str]
    method: Sequence[str]


def shown(model: ModelRef) -> str:
    """The model's name as Markdown: of a folder its last part, since paths are of one machine."""
    return escape(
        model.name if model.revision or os.sep not in model.name else os.path.basename(model.name.rstrip(os.sep))
    )


def last_part(name: str) -> str:
    """Of a model as the config names it: a folder's last part, a hub id as it is."""
    is_path = os.path.isabs(name) or name.startswith((".", "~"))
    return os.path.basename(name.rstrip(os.sep)) if is_path else name


def dtype_name(config: RunConfig) -> str:
    """Of the weights that are stored, as torch names it."""
    return str(dtype_of(config)).removeprefix("torch.")


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


def card_page(config: RunConfig, section: TrainerConfig, base: ModelRef, sources: Sequence[Source], page: Page) -> str:
    """Markdown with a YAML header. base: what was trained; sources: what it learnt from."""
    seen, rows = page.seen, section.rows
    languages = sorted(seen.per_language)
    every = seen.count == seen.given
    lines = [
        f"# {escape(page.title)}",
        "",
        *([escape(config.banner), ""] if config.banner else []),
        *page.about,
        "",
        f"## Training {rows}",
        "",
        *([] if every else [f"Training saw {seen.count} of {seen.given} {rows}: it ended inside its first pass.", ""]),
        f"| language | {rows} |",
        "| --- | ---: |",
        *(f"| {escape(language)} | {seen.per_language[language]} |" for language in languages),
        f"| all | {seen.count} |",
        "",
        "## Settings",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {escape(value)} |" for name, value in page.settings.items()),
        "",
        "## Method",
        "",
        *page.method,
        "",
    ]
    return f"---\n{_header(config, base, sources, languages, page.tag)}\n---\n\n" + "\n".join(lines)


def adapter_card(card: str) -> str:
    """The card of the adapter that a merged model was made with."""
    found: Any = ModelCard(card, ignore_metadata_errors=True)
    found.data.library_name = "peft"
    found.data.tags = [*(found.data.tags or []), "lora"]
    return str(found)


def _header(config: RunConfig, base: ModelRef, sources: Sequence[Source], languages: Sequence[str], tag: str) -> str:
    codes = hub_codes(languages)
    return str(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=base.hub or None,
            license=config.card.model_license,
            datasets=hub_ids(sources, config.languages.codes) or None,
            language=codes or None,
            tags=[tag, "trl", "congrad"],
        ).to_yaml()
    )
