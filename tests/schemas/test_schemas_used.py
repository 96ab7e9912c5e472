"""For every key of every section, and every value of the switches it belongs to: it is taken where it is used, refused elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import reduce
from itertools import product
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig
from schemas.config.base import Not, conditions_of
from schemas.config.used import Unused, in_words, unused

BASE: dict[str, Any] = {
    "name": "t",
    "languages": {"seen": ["en"]},
    "model": {"policy": "m"},
    "prompts": {"sources": [{"path": "x.jsonl"}]},
}
IMPORTED = [{"path": "pairs.jsonl"}]
OTHER: dict[str, Any] = {  # a value that is not the default, where half of it, one more or another text is none
    "pairs.sources": IMPORTED,
    "engine.base_url": "http://localhost:1/v1",
    "generate.sampling": {"top_k": 3},
    "judge.sampling": {"top_k": 3},
    "loss.label_smoothing": 0.2,
    "loss.discopop_tau": 0.2,
    "select.diversity.share": 0.5,
    "select.diversity.cells": 40,
    "judge.rubric": "r.yaml",
    "judge.engine": {"kind": "transformers"},
    "judge.panel": {"a": {}},
    "judge.criteria": {"a": {}},
    "judge.max_length": 99,
}
WITH: dict[str, dict[str, Any]] = {  # what else a value of a switch needs
    "engine.kind: openai": {"engine.base_url": "http://localhost:1/v1"},
    "loss.type: ipo": {"gradients.sketch.both_sides": True},
    "judge.method: reward_model": {"model.judge": "j"},
    "judge.method: implicit_reward": {"judge.reference": "r"},
}


def fields(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every key outside of lists with its field."""
    for name, field in model.model_fields.items():
        key = f"{at}{name}"
        yield key, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{key}.")


FIELDS = dict(fields(RunConfig))
CONDITIONAL = {key: field for key, field in FIELDS.items() if conditions_of(field)}


def switches(key: str) -> dict[str, Any]:
    """Absolute path of a switch -> what it must be."""
    section = key.rpartition(".")[0]
    return {f"{section}{k}" if k.startswith(".") else k: v for k, v in conditions_of(FIELDS[key]).items()}


def values_of(switch: str, wanted: Any) -> list[Any]:
    """Every value of a switch; of a number or list, the default and another."""
    annotation = FIELDS[switch].annotation
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [True, False]
    return [FIELDS[switch].get_default(call_default_factory=True), OTHER[switch]]


def holds(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Not):
        return value not in wanted.values
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))


def other(key: str) -> Any:
    if key in OTHER:
        return OTHER[key]
    default, annotation = FIELDS[key].default, FIELDS[key].annotation
    if get_origin(annotation) is Literal:
        return next(value for value in get_args(annotation) if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 if default else 0.25
    return "another"


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    reduce(lambda at, section: at.setdefault(section, {}), sections, config)[last] = copy.deepcopy(value)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for key in CONDITIONAL:
        wanted = switches(key)
        for combination in product(*(values_of(switch, value) for switch, value in wanted.items())):
            yield key, dict(zip(wanted, combination, strict=True))


CASES = list(cases())


@pytest.mark.parametrize(("key", "setting"), CASES, ids=[f"{key} with {setting}" for key, setting in CASES])
def test_a_key_is_taken_where_it_is_used_and_refused_by_name_elsewhere(key: str, setting: dict[str, Any]) -> None:
    config = copy.deepcopy(BASE)
    for switch, value in setting.items():
        put(config, switch, value)
        for needed, also in WITH.get(f"{switch}: {value}", {}).items():
            put(config, needed, also)
    put(config, key, other(key))
    used = all(holds(setting[switch], wanted) for switch, wanted in switches(key).items())
    try:
        RunConfig.model_validate(config)
    except ValidationError as error:
        said = str(error)
        assert not used or f"{key} has no use" not in said, said
        if not used:
            assert "has no use with" in said and "leave it out" in said
        return
    assert used, f"{key} is accepted and ignored with {setting}"


@pytest.mark.parametrize(
    "key",
    [
        "judge.votes", "judge.sampling", "judge.min_mass", "judge.method", "generate.candidates", "select.diversity.share",
        "languages.min_confidence", "gradients.sketch.seed", "model.judge", "model.evaluation_judge", "pairs.dev_fraction",
        "pairs.length_control", "loss.alpha", "conflict.orders", "generate.prefix_caching",
        *(f"engine.{name}" for name in FIELDS["engine"].annotation.model_fields if name != "kind"),
    ],
)  # fmt: skip
def test_keys_that_were_once_accepted_and_ignored_say_when_they_are_used(key: str) -> None:
    assert conditions_of(FIELDS[key]), key


def test_the_defaults_and_a_resolved_config_hold_nothing_unused() -> None:
    config = RunConfig.model_validate(BASE)
    assert not list(unused(config))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_switches_are_keys_and_their_values_are_possible() -> None:
    for key in CONDITIONAL:
        for switch, wanted in switches(key).items():
            assert switch in FIELDS, f"{key}: no such switch {switch}"
            possible = values_of(switch, wanted)
            assert {holds(value, wanted) for value in possible} == {True, False}, f"{key}: {switch} decides nothing"
        assert in_words(conditions_of(FIELDS[key]), key.rpartition(".")[0])


def test_the_refusal_says_what_belongs_where() -> None:
    assert str(Unused("judge.votes", "judge.method: expected_score", "judge.method: additive")) == (
        "judge.votes has no use with judge.method: expected_score (it belongs to judge.method: additive): leave it out"
    )
