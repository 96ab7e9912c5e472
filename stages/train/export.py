"""The result of training on disk: merged safetensors model, tokenizer, adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from schemas import files
from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.models.folder import pass_processors_on
from stages.models.generation import write_generation
from stages.models.merging import merge_checked
from stages.train.card_page import adapter_card
from stages.train.checkpoints import clear
from stages.train.session import Session

MODEL, ADAPTER = "model", "adapter"


def save_trained(session: Session, section: TrainerConfig, model: PreTrainedModel | PeftModel) -> None:
    """Write session.folder/model (merged, in the numbers of the forward, with tokenizer and chat template) and, for LoRA,
    session.folder/adapter, which PEFT loads with its base.

    Both appear under their name only when whole. The model is used up: adapters are merged into it. Raises UserError when a
    trained weight is not finite, or the merged model computes something else.
    """
    tokenizer = session.renderer.tokenizer
    clear(session.folder)
    broken = [n for n, p in model.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if broken:
        raise UserError(
            f"{len(broken)} trained weights are not finite, for example {broken[0]}",
            where=section.section,
            fix=f"Lower {section.section}.learning_rate, or use model.dtype: bfloat16 or float32.",
        )
    if isinstance(model, PeftModel):
        with files.publishing(session.folder / ADAPTER) as target:
            _save_adapter(model, target, session.start)
            tokenizer.save_pretrained(target)
        merged = merge_checked(model, "that was trained")
    else:
        merged = model
    merged = merged.to(session.numbers.compute)
    with files.publishing(session.folder / MODEL) as target:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
        assert session.start.path is not None
        pass_processors_on(session.start.path, target)
        write_generation(session.start.path, target, session.renderer.stop_ids)


def write_cards(folder: Path, card: str) -> None:
    """Beside the model, and beside its adapter if there is one."""
    files.write_text(folder / MODEL / "README.md", card)
    if (folder / ADAPTER).is_dir():
        files.write_text(folder / ADAPTER / "README.md", adapter_card(card))


def exported(folder: Path) -> list[Path]:
    """The files `save_trained` wrote, sorted."""
    return sorted(p for name in (ADAPTER, MODEL) for p in (folder / name).rglob("*") if p.is_file())


def _save_adapter(model: PeftModel, target: Path, base: ModelRef) -> None:
    """base_model_name_or_path is what any library on this machine finds the base by: its hub id and commit, or its folder."""
    model.save_pretrained(str(target), save_embedding_layers=False)
    assert base.path is not None
    config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.hub if base.revision else str(base.path.resolve())
    config["revision"] = base.revision or None
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (target / "README.md").unlink(missing_ok=True)
