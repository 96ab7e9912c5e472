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


class Useless(ValueError):
    """A config that gives a key without use. key: the first of them."""

    def __init__(self, found: Unused) -> None:
        super().__init__(str(found))
        self.key = found.key


Conditions = tuple[Mapping[str, Any], ...]


def unused(config: BaseModel) -> Iterator[Unused]:
    """Keys that are given (not at their defaults) and have no use in this config."""
    yield from _unused(config, config, None, "", ())


def in_words(conditions: Conditions, at: str = "") -> str:
    """`judge.method: additive` of a field's `used_when`; at: the section that keys beginning with a dot are of."""
    return ", or ".join(
        " and ".join(_owner(_absolute(key, at), wanted) for key, wanted in one.items()) for one in conditions
    )


def _unused(
    root: BaseModel, section: BaseModel, default: Any, at: str, above: tuple[Conditions, ...]
) -> Iterator[Unused]:
    """default: the section's own, where it differs from its fields' defaults. above: conditions of the sections it lies in."""
    for name, field in type(section).model_fields.items():
        key, value = f"{at}.{name}" if at else name, getattr(section, name)
        own = tuple({_absolute(k, at): wanted for k, wanted in one.items()} for one in conditions_of(field))
        conditions = (*above, own) if own else above
        standard = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        if isinstance(value, BaseModel):
            yield from _unused(root, value, standard if isinstance(standard, BaseModel) else None, key, conditions)
            continue
        refused = next(filter(None, (_refusal(root, key, one_of) for one_of in conditions)), None)
        if refused is not None and value != standard:
            yield refused
        elif isinstance(value, (list, dict)):
            for place, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _unused(root, item, None, f"{key}.{place}", conditions)


def _refusal(root: BaseModel, key: str, one_of: Conditions) -> Unused | None:
    """None where one of the conditions holds; else what speaks against the first, and what would help."""
    failing = [_failing(root, conditions) for conditions in one_of]
    if None in failing:
        return None
    switch = next(iter(failing[0] or {}))
    owner = ", or ".join(" and ".join(_owner(*wanted) for wanted in (missing or {}).items()) for missing in failing)
    return Unused(key, f"{switch}: {_shown(_value(root, switch))}", owner)


def _failing(root: BaseModel, conditions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    missing = {path: wanted for path, wanted in conditions.items() if not _holds(_value(root, path), wanted)}
    return missing or None


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
        return f"{len(value)} entr{'y' if len(value) == 1 else 'ies'}" if value else str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
