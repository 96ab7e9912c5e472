"""The generation settings of a model's folder: passed on as they are, whatever transformers thinks of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from schemas import files
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
    generates by this file goes on after the turn."""
    paths = [folder / _NAME for folder in (source, target)]
    found = next((read_json(path, str(path)) for path in paths if path.is_file()), None)
    if found is None:
        return
    there = found.get("eos_token_id")
    ends = sorted({*([] if there is None else there if isinstance(there, list) else [there]), *stop_ids})
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    files.write_text(target / _NAME, json.dumps(found, indent=2, sort_keys=True) + "\n")
