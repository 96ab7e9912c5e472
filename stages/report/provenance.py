"""What every part of the report was made from: the stages, and those of their settings that are not defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.config import RunConfig
from schemas.config.base import semantic_values
from schemas.manifests import StageManifest

_MAKERS = {
    "conflict": ("conflict",),
    "weights": ("conflict",),
    "scores": ("conflict", "select"),
    "errors": ("pairs", "conflict", "select"),
    "beside": ("conflict", "select"),
    "sides": ("pairs", "select"),
    "training": ("sft", "train"),
    "results": ("evaluate",),
    "pairs": ("select",),
}
_OWN = {"conflict": ("gradients", "loss", "conflict"), "train": ("loss", "train")}
"""Config sections a reader thinks of as the stage's, where that is more than the one of its name."""


def made_by(section: str, config: RunConfig, manifests: Sequence[StageManifest]) -> list[tuple[str, str]]:
    """(stage, its settings in words) for a section of the report; of the stages that are there."""
    there = {manifest.stage for manifest in manifests}
    return [(stage, ", ".join(_settings(config, stage))) for stage in _MAKERS.get(section, ()) if stage in there]


def _settings(config: RunConfig, stage: str) -> list[str]:
    found = []
    for section in _OWN.get(stage, (stage,)):
        values = semantic_values(getattr(config, section))
        defaults = semantic_values(type(config).model_fields[section].default)
        found += _other(section, values, defaults)
    return found


def _other(path: str, value: Any, default: Any) -> list[str]:
    """`select.keep 0.7` for every setting that is not the default; of lists how long they are."""
    if value == default:
        return []
    if isinstance(value, dict) and isinstance(default, dict):
        return [line for name in value for line in _other(f"{path}.{name}", value[name], default.get(name))]
    if isinstance(value, list):
        entry = "entry" if len(value) == 1 else "entries"
        return [f"{path} {len(value)} {entry}"]
    return [f"{path} {value:g}" if isinstance(value, float) else f"{path} {value}"]
