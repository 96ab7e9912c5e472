"""For every key of every section, and every value of the switches it belongs to: it is taken where it is used, refused elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig
from schemas.config.base import Not, conditions_of
from schemas.config.curation import ConflictConfig
from schemas.config.used import Unused, in_words, unused

BASE: dict[str, Any] = {
    "name": "t",
    "languages": {"seen": ["en"]},
    "model": {"policy": "m"},
    "prompts": {"sources": [{"path": "x.jsonl"}]},
}
IMPORTED = [{"path": "pairs.jsonl"}]
BASES: tuple[dict[str, Any], ...] = (  # what else a key may need to be possible at all
    {},
    {"train.method": "full"},
    {"pairs.sources": IMPORTED},
    {"train.method": "full", "train.merge.base": "base", "train.optimizer": "ondare"},
)
OTHER: dict[str, Any] = {  # a value that is not the default, where half of it, one more or another text is none
    "pairs.sources": IMPORTED,
    "prompts.sources": [{"path": "x.jsonl"}],
    "sft.sources": [{"path": "talks.jsonl"}],
    "engine.base_url": "http://localhost:1/v1",
    "loss.label_smoothing": 0.2,
    "loss.discopop_tau": 0.2,
    "loss.gamma": 0.2,
    "requests_per_minute": 60,
    "input_price": 0.5,
    "output_price": 0.5,
    "select.diversity.share": 0.5,
    "conflict.language_weights": {"en": 2.0},
    "select.diversity.cells": 40,
    "judge.rubric": "r.yaml",
    "judge.engine": {"kind": "transformers"},
    "judge.panel": {"a": {}},
    "judge.criteria": {"a": {}},
    "judge.max_length": 99,
    "judge.engine.base_url": "http://localhost:1/v1",
    "train.orthalign.objectives": [{"name": "a", "where": "true"}, {"name": "b", "where": "true"}],
    "evaluate.prompts_per_language": 0,
    "evaluate.tasks": ["mgsm"],
    "evaluate.prompts": [{"path": "x.jsonl"}],
    "evaluate.baseline.answers": [{"path": "x.jsonl"}],
    "evaluate.second_judge.engine": {"kind": "transformers"},
    "evaluate.second_judge.engine.base_url": "http://localhost:1/v1",
    "evaluate.benchmarks.languages": {"mgsm": "de"},
    "evaluate.benchmarks.fewshot": 3,
    "train.max_steps": 5,
    "sft.max_steps": 5,
    "train.allo.forget_max_steps": 5,
    "train.allo.key_fraction": 1.0,
    "train.report_to": ["wandb"],
    "sft.report_to": ["wandb"],
    "delimiter": ";",
    "language": "de",
    "temperature": 0.0,
    "limit": 3,
    "stop": ["x"],
    "splits": {"valid": "dev"},
    "on_policy": ["me"],
    "loss.alpha": 0.5,
    "train.merge.alpha": 0.5,
    "reserve": 0.5,
    "forget_learning_rate": 0.5,
    "select.seed": 5,
}
WITH: dict[str, dict[str, Any]] = {  # what else a value of a switch needs
    "engine.kind: openai": {"engine.base_url": "http://localhost:1/v1"},
    "train.language_surgery: pcgrad": {"languages.seen": ["en", "de"]},
    "loss.type: ipo": {"gradients.sketch.both_sides": True},
    "loss.type: simpo": {"gradients.sketch.both_sides": True},
    "judge.method: reward_model": {"model.judge": "j"},
    "judge.method: implicit_reward": {"judge.reference": "r", "engine.kind": "transformers"},
    "judge.engine.kind: openai": {"judge.engine.base_url": "http://localhost:1/v1"},
    "evaluate.second_judge.engine.kind: openai": {"evaluate.second_judge.engine.base_url": "http://localhost:1/v1"},
    "prompts.sources: []": {"pairs.sources": IMPORTED},
    "train.optimizer: anchor": {"train.merge.alpha": 0.1},
    "train.allo.token_reward: dpo_model": {"train.allo.reward_model": "r"},
    "train.allo.token_reward: classifier": {"train.allo.reward_model": "r"},
    "train.allo.forget: False": {"train.allo.learn": True},
}
Groups = tuple[tuple[dict[str, Any], ...], ...]
"""Of each group one mapping must hold: a key's own `used_when`, and those of the sections it lies in."""


def fields(model: type[BaseModel], at: str = "", above: Groups = ()) -> Iterator[tuple[str, Any, Groups]]:
    """Every key with its field and its conditions; of a list of sections, the first entry's."""
    for name, field in model.model_fields.items():
        key = f"{at}{name}"
        own = tuple(
            {f"{at[:-1]}{k}" if k.startswith(".") else k: v for k, v in one.items()} for one in conditions_of(field)
        )
        groups = (*above, own) if own else above
        inner = [field.annotation, *get_args(field.annotation)]
        if (
            get_origin(field.annotation) is dict
        ):  # by name: their sections have keys of sections that are walked elsewhere
            inner = []
        section = next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if section is None or get_origin(field.annotation) is list:
            yield key, field, groups
        if section is not None:
            entry = ".0" if get_origin(field.annotation) is list else ""
            yield from fields(section, f"{key}{entry}.", groups)


FIELDS = {key: field for key, field, _ in fields(RunConfig)}
CONDITIONS = {key: groups for key, _, groups in fields(RunConfig)}


def switches(key: str) -> list[str]:
    """The switches that decide about a key, but for lists that it lies in itself."""
    named = dict.fromkeys(switch for group in CONDITIONS[key] for one in group for switch in one)
    return [switch for switch in named if switch != key and not key.startswith(f"{switch}.")]


CONDITIONAL = [key for key in CONDITIONS if switches(key)]


def values_of(switch: str) -> list[Any]:
    """Every value of a switch; of a number, text or list, the default and another."""
    annotation = FIELDS[switch].annotation
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [True, False]
    return [FIELDS[switch].get_default(call_default_factory=True), other(switch)]


def holds(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Not):
        return value not in wanted.values
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))


def other(key: str) -> Any:
    """A value that is not the default."""
    last = key.rpartition(".")[2]
    if key in OTHER or last in OTHER:
        return OTHER.get(key, OTHER.get(last))
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
    """Set a key; entries of lists are made where there are none."""
    at: Any = config
    for section, below in pairwise(key.split(".")):
        if section == "0":
            at[:] = at or [{"path": "x.jsonl"}]
            at = at[0]
        else:
            at = at.setdefault(section, [] if below == "0" else {})
    at[key.rpartition(".")[2]] = copy.deepcopy(value)


def refusal(key: str, setting: dict[str, Any], base: dict[str, Any]) -> str | None:
    """What a config with the key and these switches is refused with; None: it is taken."""
    config = copy.deepcopy(BASE)
    needed = [WITH.get(f"{switch}: {value}", {}) for switch, value in [*setting.items(), (key, other(key))]]
    for settings in (base, *needed, setting, {key: other(key)}):
        for switch, value in settings.items():
            put(config, switch, value)
    if key == "evaluate.sampling.temperature":  # its section's own default is the value that others know as another
        put(config, key, 0.5)
    try:
        RunConfig.model_validate(config)
    except ValidationError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", CONDITIONAL)
def test_a_key_is_taken_where_it_is_used_and_refused_by_name_elsewhere(key: str) -> None:
    taken, named = False, False
    for values in product(*(values_of(switch) for switch in switches(key))):
        setting = dict(zip(switches(key), values, strict=True))
        used = all(
            any(all(s not in setting or holds(setting[s], w) for s, w in one.items()) for one in group)
            for group in CONDITIONS[key]
        )
        for base in BASES:
            said = refusal(key, setting, base)
            named_as = (key, key.partition(".0.")[0])  # a list of sections is refused as one
            ours = (
                said is not None
                and any(f"{name} has no use with" in said for name in named_as)
                and "leave it out" in said
            )
            assert used or said is not None, f"{key} is accepted and ignored with {setting}"
            assert not (used and ours), said
            taken, named = taken or said is None, named or ours
    assert taken, f"{key}: no setting in which it is taken was tried"
    assert named, f"{key}: no setting in which it is refused was tried"


@pytest.mark.parametrize(
    "key",
    [
        "judge.votes", "judge.sampling.max_tokens", "judge.min_mass", "judge.method", "generate.candidates", "select.diversity.share",
        "languages.min_confidence", "gradients.sketch.seed", "model.judge", "model.evaluation_judge", "pairs.dev_fraction",
        "pairs.length_control", "loss.alpha", "conflict.orders", "generate.prefix_caching",
        *(key for key in FIELDS if key.startswith(("sft.", "train.allo.", "train.merge.", "train.lora.", "engine.")) and key != "engine.kind"),
    ],
)  # fmt: skip
def test_keys_that_were_once_accepted_and_ignored_say_when_they_are_used(key: str) -> None:
    assert CONDITIONS[key], key


def test_the_defaults_and_a_resolved_config_hold_nothing_unused() -> None:
    config = RunConfig.model_validate(BASE)
    assert not list(unused(config))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_switches_are_keys_and_their_values_are_possible() -> None:
    for key in CONDITIONAL:
        for one in (one for group in CONDITIONS[key] for one in group):
            for switch, wanted in one.items():
                assert switch in FIELDS, f"{key}: no such switch {switch}"
                found = {holds(value, wanted) for value in values_of(switch)}
                assert found == {True, False}, f"{key}: {switch} decides nothing"
        assert all(map(in_words, CONDITIONS[key]))


def test_the_refusal_says_what_belongs_where() -> None:
    assert str(Unused("judge.votes", "judge.method: expected_score", "judge.method: additive")) == (
        "judge.votes has no use with judge.method: expected_score (it belongs to judge.method: additive): leave it out"
    )


def test_a_section_given_in_part_takes_the_rest_from_its_own_default() -> None:
    config = RunConfig.model_validate(BASE | {"evaluate": {"sampling": {"max_tokens": 9}}})
    assert (config.evaluate.sampling.temperature, config.evaluate.sampling.max_tokens) == (0.0, 9)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_trusted_pairs_under_the_target_are_told_where_they_go():
    with pytest.raises(ValueError, match=r"pairs\.sources with `split: dev`"):
        ConflictConfig.model_validate({"target": {"sources": ["trusted.jsonl"]}})
