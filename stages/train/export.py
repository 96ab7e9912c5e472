"""The result of training on disk: merged safetensors model, tokenizer, adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas import files
from schemas.errors import UserError


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base_name: str,
    dtype: torch.dtype,
    section: str,
) -> None:
    """Write folder/model (merged, in `dtype`, with tokenizer and chat template) and, for LoRA, folder/adapter.

    Both appear under their name only when whole. `base_name` replaces this machine's path of the base model. The model
    is used up: adapters are merged into it. Raises UserError when a trained weight is not finite.
    """
    broken = [n for n, p in model.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if broken:
        raise UserError(
            f"{len(broken)} trained weights are not finite, for example {broken[0]}",
            where=section,
            fix=f"Lower {section}.learning_rate, or use model.dtype: bfloat16 or float32.",
        )
    if isinstance(model, PeftModel):
        with files.publishing(folder / "adapter") as target:
            _save_adapter(model, target, base_name)
        merged = model.merge_and_unload()
    else:
        merged = model
    merged = merged.to(dtype)
    with files.publishing(folder / "model") as target:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)


def exported(folder: Path) -> list[Path]:
    """The files `export_model` wrote, sorted."""
    return sorted(p for name in ("adapter", "model") for p in (folder / name).rglob("*") if p.is_file())


def _save_adapter(model: PeftModel, target: Path, base_name: str) -> None:
    model.save_pretrained(str(target), save_embedding_layers=False)
    config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (target / "README.md").unlink(missing_ok=True)
