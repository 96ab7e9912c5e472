"""How a config field says whether it changes results (semantic) or only how they are computed (execution)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from schemas.paths import expanded

_ROLE = "x-role"


@dataclass(frozen=True)
class Not:
    """In `used_when`: any value but these."""

    values: tuple[Any, ...]


def other_than(*values: Any) -> Not:
    """See `Not`."""
    return Not(values)


UsedWhen = Mapping[str, Any] | tuple[Mapping[str, Any], ...]
"""Keys (from the root, or after a dot of the same section) -> the value, values or `other_than` that they must all have; or several such
mappings, one of which must hold."""


class Section(BaseModel):
    """A config section: unknown keys and infinite numbers are errors, every field is semantic unless made by `execution`."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes and no are True and False, which pydantic takes for 1 and 0."""
        if any(isinstance(each, bool) for each in _members(value)):
            kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
            if {int, float} & kinds and bool not in kinds:
                raise ValueError("a number is wanted, and no truth value")
        return value

    @model_validator(mode="before")
    @classmethod
    def _rest_from_the_default(cls, value: Any) -> Any:
        """A section that is given in part takes the rest from its default here, which may differ from its class's."""
        if not isinstance(value, dict):
            return value
        given = {
            name: section for name, section in value.items() if isinstance(section, dict) and name in cls.model_fields
        }
        defaults = {name: cls.model_fields[name].default for name in given}
        return value | {
            name: default.model_dump(exclude_defaults=True) | given[name]
            for name, default in defaults.items()
            if isinstance(default, BaseModel)
        }


def _members(value: Any) -> list[Any]:
    """The values of a list or mapping, or the one value."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _kinds(annotation: Any) -> set[Any]:
    """The annotation, or the members of a union."""
    return set().union(*map(_kinds, args)) if (args := get_args(annotation)) else {annotation}


def semantic(default: Any = ..., description: str = "", *, used_when: UsedWhen | None = None, **kwargs: Any) -> Any:
    """A field that changes results: part of the fingerprint of the stages that read it.

    used_when: with what other settings this field has a use; a section's holds for all that is in it. Without them the field must stay at
    its default (`schemas.config.used`).
    """
    return _field("semantic", default, description, used_when, kwargs)


def execution(default: Any = ..., description: str = "", *, used_when: UsedWhen | None = None, **kwargs: Any) -> Any:
    """A field that changes only speed, place or display: may change between a crash and its resume. used_when: as `semantic`."""
    return _field("execution", default, description, used_when, kwargs)


def _field(role: str, default: Any, description: str, used_when: UsedWhen | None, kwargs: dict[str, Any]) -> Any:
    field: Any = Field(default, description=description, json_schema_extra={_ROLE: role}, **kwargs)
    if used_when:
        field.metadata.append(_UsedWhen(used_when if isinstance(used_when, tuple) else (used_when,)))
    return field


@dataclass(frozen=True)
class _UsedWhen:
    conditions: tuple[Mapping[str, Any], ...]


def _filled_in(value: Any) -> Any:
    return expanded(value) if isinstance(value, str) else value


FilePath = Annotated[str, BeforeValidator(_filled_in)]
"""A path, or a name that stands for one (hub id, `package:FILE`, `embedded:NAME`): `~` and `$VARIABLES` are filled in."""


def conditions_of(field: Any) -> tuple[Mapping[str, Any], ...]:
    """`used_when` of a pydantic FieldInfo, of which one must hold; empty: it is always used."""
    return next((entry.conditions for entry in field.metadata if isinstance(entry, _UsedWhen)), ())


def is_execution(field: Any) -> bool:
    """Whether a pydantic FieldInfo was made by `execution`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get(_ROLE) == "execution"


def semantic_values(section: BaseModel) -> dict[str, Any]:
    """The section's semantic fields as JSON values, nested sections included."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        if is_execution(field):
            continue
        values[name] = jsonable(getattr(section, name))
    return values


def jsonable(value: Any) -> Any:
    """A value of a config as JSON; of sections the semantic fields."""
    if isinstance(value, BaseModel):
        return semantic_values(value)
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)
