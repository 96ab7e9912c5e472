"""Texts to check with: the shipped prompts and authored pairs of the run's languages."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from schemas.languages import base_language
from stages.data import data_path


@lru_cache(maxsize=64)
def shipped(folder: str, language: str) -> tuple[dict[str, Any], ...]:
    """Rows of data/<folder> in a language or its base language; none if the package has none."""
    for code in dict.fromkeys([language, base_language(language)]):
        path = data_path(f"{folder}/{code}.jsonl")
        if path.is_file():
            return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return ()


def prompts(language: str, count: int) -> list[str]:
    """Some prompts, spread over the file: short and long ones."""
    rows = shipped("prompts", language)
    return [rows[i * len(rows) // count]["prompt"] for i in range(min(count, len(rows)))]
