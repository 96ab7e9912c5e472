"""What a stage's result depends on: semantic config, content of inputs, models and files, code version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii as _json
from operator import attrgetter
from typing import Any

from schemas.config import RunConfig
from schemas.config.base import is_execution, jsonable, semantic_values
from schemas.ids import content_id
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
    """The ingredients that changed, for people: `select.keep: 0.5 -> 0.3`. That inputs changed is said where nothing else did."""
    settings: list[str] = []
    contents: list[str] = []
    inputs: list[str] = []
    names = sorted(set(before) | set(now))
    for name in names:
        old, new = before.get(name), now.get(name)
        filled = {} in (old, new) and any(other.startswith(f"{name}.") for other in names)
        if old == new or filled:  # what came into an empty section, or left it, is said by its own names
            continue
        if name in ("code", "schema"):
            contents.append(f"the pipeline's {name} for it is another version ({old} -> {new})")
        elif name.startswith("input "):
            inputs.append(f"{name} changed")
        elif name.startswith(("model ", "file ")):
            contents.append(f"{name} {'is new' if old is None else 'is no longer used' if new is None else 'changed'}")
        else:
            settings += _setting(name, old, new)
    return [*settings, *contents] or inputs


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """The semantic settings that differ between two configs, for people, as `differences`."""
    flat = [
        {key.removeprefix("."): value for key, value in _flatten("", semantic_values(one)).items()}
        for one in (before, now)
    ]
    return differences(*flat)


def _setting(name: str, old: Any, new: Any) -> list[str]:
    """A changed setting; of lists what was added, taken away or changed in them, never the whole of them."""
    if not isinstance(old, list) or not isinstance(new, list):
        return [f"{name}: {_shown(old)} -> {_shown(new)}"]
    if any(isinstance(value, (dict, list)) for value in [*old, *new]):
        if len(old) != len(new):
            return [f"{name}: {len(old)} -> {len(new)} entries"]
        pairs = [
            (f"{name}.{n}", _flatten("", a), _flatten("", b)) for n, (a, b) in enumerate(zip(old, new, strict=True))
        ]
        keys = [(f"{at}{key}", a.get(key), b.get(key)) for at, a, b in pairs for key in sorted(a | b)]
        return [line for key, a, b in keys if a != b for line in _setting(key, a, b)]
    changes = [f"+{_shown(v)}" for v in new if v not in old] + [f"-{_shown(v)}" for v in old if v not in new]
    return [
        f"{name}: {', '.join(changes[:6])}{', ...' if changes[6:] else ''}" if changes else f"{name}: another order"
    ]


def _shown(value: Any) -> str:
    """A setting's value as it stands in a config file, cut when long."""
    text = {None: "none", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = text or (f"{value:g}" if isinstance(value, float) else str(value))
    return text if len(text) <= 80 else text[:80] + "..."


def content_of(records: Iterable[FileRecord]) -> str:
    """Content hash of a table or a folder: of its files' hashes, in path order."""
    pairs = [  # as JSON, ["name","hash"], without an encoder for each
        f"[{_json(file.path.rpartition('/')[2])},{_json(file.sha256)}]"
        for file in sorted(records, key=attrgetter("path"))
    ]
    return hashlib.sha256("".join(pairs).encode()).hexdigest()


def _values_at(config: RunConfig, dotted: str) -> Any:
    owner: Any = config
    for name in dotted.split("."):
        if is_execution(type(owner).model_fields[name]):
            return {}
        owner = getattr(owner, name)
    return jsonable(owner)


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, child in value.items() for k, v in _flatten(f"{prefix}.{key}", child).items()}
    return {prefix: value}
