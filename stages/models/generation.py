"""The generation settings of a model's folder: passed on as they are, whatever transformers thinks of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from schemas import files
from schemas.errors import UserError
from stages.models.folder import read_json

_NAME = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def drop_unsavable(model: Any) -> None:
    """Of a model that was just read: settings that contradict each other (sampling values without `do_sample`) are read with a warning, and
    then no model that has them is written. Its tokens stay; nothing here generates by the others."""
    found = getattr(model, "generation_config", None)
    if found is None:
        return
    try:
        found.validate(strict=True)
    except ValueError:
        model.generation_config = type(found)(**{name: getattr(found, name, None) for name in _TOKENS})


def write_generation(source: Path, target: Path, stop_ids: Collection[int]) -> None:
    """The settings of the model in `source`, for what it became in `target`. stop_ids: tokens that it learnt to end with; without them whoever
    generates by this file goes on after the turn. A damaged file of the source, which transformers reads as none, is none here, too."""
    found = next((read for folder in (source, target) if (read := _read(folder / _NAME)) is not None), None)
    if found is None:
        return
    there = found.get("eos_token_id")
    listed = there if isinstance(there, list) else [there]
    ends = sorted({*(token for token in listed if type(token) is int), *stop_ids})
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    files.write_text(target / _NAME, json.dumps(found, indent=2, sort_keys=True) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, str(path)) if path.is_file() else None
    except UserError:
        return None
