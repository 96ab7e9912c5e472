"""Which keys of a config are used, given the others: the fact stands on the field (`used_when`), refusals and docs follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from schemas.config.base import Not, conditions_of


@dataclass(frozen=True)
class Unused:
    """A key that the setting `why` gives no use, and the setting it belongs to."""

    key: str
    why: str
    owner: str

    def __str__(self) -> str:
        return f"{self.key} has no use with {self.why} (it belongs to {self.owner}): leave it out"


def unused(config: BaseModel) -> Iterator[Unused]:
    """Keys that are given (not at their defaults) and have no use in this config."""
    yield from _unused(config, config, "")


def in_words(conditions: Mapping[str, Any], at: str = "") -> str:
    """`judge.method: additive` of a field's `used_when`; at: the section that keys beginning with a dot are of."""
    return " and ".join(_owner(_absolute(key, at), wanted) for key, wanted in conditions.items())


def _unused(root: BaseModel, section: BaseModel, at: str) -> Iterator[Unused]:
    for name, field in type(section).model_fields.items():
        key = f"{at}.{name}" if at else name
        value = getattr(section, name)
        refused = _refusal(root, conditions_of(field), key, at)
        if refused is not None and value != field.get_default(call_default_factory=True):
            yield refused
        elif isinstance(value, BaseModel):
            yield from _unused(root, value, key)
        elif isinstance(value, (list, dict)):
            for place, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _unused(root, item, f"{key}.{place}")


def _refusal(root: BaseModel, conditions: Mapping[str, Any], key: str, at: str) -> Unused | None:
    for switch, wanted in conditions.items():
        path = _absolute(switch, at)
        value = _value(root, path)
        if not _holds(value, wanted):
            return Unused(key, f"{path}: {_shown(value)}", _owner(path, wanted))
    return None


def _absolute(key: str, at: str) -> str:
    return f"{at}{key}" if key.startswith(".") else key


def _value(root: Any, path: str) -> Any:
    for step in path.split("."):
        if isinstance(root, list):
            root = root[int(step)]
        else:
            root = root[step] if isinstance(root, dict) else getattr(root, step)
    return root


def _holds(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Not):
        return value not in wanted.values
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))


def _owner(path: str, wanted: Any) -> str:
    if isinstance(wanted, Not):
        return f"{path} other than {' or '.join(map(_shown, wanted.values))}"
    return f"{path}: {' or '.join(map(_shown, wanted if isinstance(wanted, tuple) else (wanted,)))}"


def _shown(value: Any) -> str:
    """As in YAML; a list or mapping of sections by its length."""
    if isinstance(value, (list, dict)):
        return f"{len(value)} entries" if value else str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
