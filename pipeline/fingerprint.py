"""What a stage's result depends on: semantic config, content of inputs, models and files, code version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from schemas.config import RunConfig
from schemas.config.base import is_execution, semantic_values
from schemas.ids import canonical_json, content_id
from schemas.manifests import SCHEMA_VERSION, FileRecord
from stages.spec import StageSpec


def ingredients(
    spec: StageSpec,
    config: RunConfig,
    round_: int,
    *,
    inputs: Mapping[str, str],
    models: Mapping[str, str],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """Everything the stage's result depends on, as a flat mapping of readable names to JSON values.

    inputs: table -> content hash; models: role -> digest; files: name -> SHA-256 of files the config points to.
    """
    values: dict[str, Any] = {"code": spec.version, "schema": SCHEMA_VERSION, "round": round_, "seed": config.seed}
    for section in spec.sections:
        values.update(_flatten(section, _values_at(config, section)))
    values.update({f"input {name}": content for name, content in inputs.items()})
    values.update({f"model {role}": digest for role, digest in models.items()})
    values.update({f"file {name}": digest for name, digest in files.items()})
    return values


def fingerprint(values: Mapping[str, Any]) -> str:
    """Hash of the ingredients."""
    return content_id(dict(values))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The ingredients that changed, for people: `select.keep: 0.5 -> 0.3`."""
    lines = []
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            if name.startswith(("input ", "model ", "file ")):
                lines.append(f"{name} changed")
            else:
                lines.append(f"{name}: {before.get(name)!r} -> {now.get(name)!r}")
    return lines


def content_of(records: Iterable[FileRecord]) -> str:
    """Content hash of a table or a folder: of its files' hashes, in path order."""
    digest = hashlib.sha256()
    for file in sorted(records, key=lambda f: f.path):
        digest.update(canonical_json([file.path.rsplit("/", 1)[-1], file.sha256]).encode())
    return digest.hexdigest()


def _values_at(config: RunConfig, dotted: str) -> Any:
    owner: Any = config
    for name in dotted.split("."):
        if is_execution(type(owner).model_fields[name]):
            return {}
        owner = getattr(owner, name)
    return semantic_values(owner) if isinstance(owner, BaseModel) else owner


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, child in value.items() for k, v in _flatten(f"{prefix}.{key}", child).items()}
    return {prefix: value}
