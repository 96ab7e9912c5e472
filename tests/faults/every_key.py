"""Every key of the config, with another valid value for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.config import RunConfig
from schemas.config.base import is_execution

_SPECIAL: dict[str, Any] = {
    "name": "renamed",
    "run_dir": "elsewhere",
    "rounds": 1,
    "languages.seen": ["en", "fr"],
    "languages.unseen": ["sw"],
    "select.diversity.cells": 50,
    "conflict.target": None,  # one round only
    "conflict.language_weights": {"en": 2.0},
    "gradients.of": None,  # with rounds, adapter needs train.method: lora
    "loss.label_smoothing": None,  # belongs to other losses
    "loss.discopop_tau": None,
    "train.orthalign.tolerance": None,  # belongs to rank: search
    "train.sharding": "ddp",
    "train.allo.mask": "gradient",
    "train.allo.forget_max_steps": 5,
    "gradients.token_budget": 4096,  # one of few tokens is refused
    "train.max_steps": 5,
    "sft.max_steps": 5,
    "sft.report_to": ["tensorboard"],
    "train.allo.token_reward": "dpo_model",
    "prompts.sources.0.language": "de",
    "pairs.sources.0.language": "de",
    "sft.sources.0.language": "de",
    "evaluate.authored.0.language": "de",
    "prompts.sources.0.splits": {"validation": "dev"},
    "pairs.sources.0.splits": {"validation": "dev"},
    "judge.engine": {"kind": "transformers", "batch_size": 3},
    "judge.panel": {"a": {}, "b": {"method": "pairwise"}},
    "judge.criteria": {"a": {}, "b": {"method": "pairwise"}},
    "judge.chat_template": None,  # a file
    "judge.cross_lingual": None,  # needs a run with English
    "judge.head": 1,
    "judge.max_length": 99,
    "judge.method": "pairwise",
    "pairs.sources": None,  # ends generation: see test_imported_pairs_replace_generation
    "engine.base_url": "http://localhost:9/v1",
    "evaluate.splits": ["test"],
    "evaluate.benchmarks.languages": {"x": "de"},
    "evaluate.prompts": [{"path": "x.jsonl"}],
    "evaluate.baseline.answers": [{"path": "x.jsonl"}],
    "evaluate.second_judge.engine": None,  # only with a second judge
    "train.report_to": ["tensorboard"],
    "train.orthalign.objectives.0.where": "language = 'en'",
    "train.orthalign.objectives.1.where": "language = 'de'",
    "train.method": None,  # full: the merging optimizers of the base config refuse LoRA
    "train.optimizer": "onties",
    "train.lora.target_modules": ["q_proj"],
    "gradients.sketch.method": "exact",  # one_sided adds a stage
    "gradients.sketch.precondition": None,  # adds a stage
    "text.chat_template_kwargs": {"enable_thinking": True},
}


_ONE_SIDED = ("gradients.aggregate_size", "gradients.sketch.rank", "gradients.sketch.precondition_pairs")


def base_config() -> dict[str, Any]:
    """A config in which every key can be changed alone."""
    return {
        "name": "t",
        "run_dir": "runs",
        "rounds": 2,
        "languages": {"seen": ["en", "de"], "unseen": ["it"]},
        "model": {"policy": "some/model", "dtype": "float32"},
        "engine": {"kind": "transformers"},
        "prompts": {"sources": [{"path": "prompts.jsonl"}]},
        "sft": {"sources": [{"path": "talks.jsonl"}], "method": "lora"},
        "conflict": {"direction": "ema", "metric": "coordinate"},
        "select": {"by": "random", "diversity": {"cells": 40}},
        "train": {
            "method": "full",
            "optimizer": "ondare",
            "merge": {"base": "some/base", "preset": "released"},
            "orthalign": {
                "objectives": [{"name": "a", "where": "true"}, {"name": "b", "where": "true"}],
                "reference": "round",
            },
        },
        "evaluate": {
            "authored": [{"path": "pairs.jsonl"}],
            "sampling": {"temperature": 0.5},
            "tasks": ["mgsm"],
            "benchmarks": {"folder": "tasks"},
        },
    }


def allo_config() -> dict[str, Any]:
    """A config in which every key of train.allo can be changed alone: with phases the base config contradicts itself."""
    allo = {"mask": "warmup", "token_reward": "classifier", "reward_model": "some/rewards"}
    return base_config() | {"train": {"method": "full", "allo": allo}}


def allo_sequence_config() -> dict[str, Any]:
    """A config in which the keys of train.allo together with train.orthalign can be changed."""
    objectives = [{"name": "a", "where": "true"}, {"name": "b", "where": "true"}]
    return base_config() | {
        "train": {"method": "full", "allo": {"mask": "warmup"}, "orthalign": {"objectives": objectives}}
    }


def parallel_config() -> dict[str, Any]:
    """A config in which the keys of several processes can be changed."""
    return base_config() | {"train": {"method": "lora", "processes": 2}}


def one_sided_config() -> dict[str, Any]:
    """A config in which the keys that only one-sided compression or preconditioning has can be changed."""
    sketch = {"method": "one_sided", "precondition": "adam_factored"}
    return base_config() | {"gradients": {"sketch": sketch}, "conflict": {}, "select": {}}


def lora_config() -> dict[str, Any]:
    """A config in which train.lora and train.processes can be changed alone: the base config refuses both."""
    return base_config() | {"train": {"method": "lora"}}


def openai_config() -> dict[str, Any]:
    """A config in which the keys of a server can be changed: it has no weights for sft."""
    return base_config() | {"engine": {"kind": "openai", "base_url": "http://localhost:8000/v1"}, "sft": {}}


def simpo_config() -> dict[str, Any]:
    """A config in which the keys of a loss without a reference can be changed."""
    return base_config() | {"loss": {"type": "simpo"}, "conflict": {"weighting": "none"}, "train": {"method": "full"}}


def vllm_config() -> dict[str, Any]:
    """A config in which the keys of vLLM can be changed."""
    return base_config() | {"engine": {"kind": "vllm"}}


def additive_config() -> dict[str, Any]:
    """A config in which the keys of a judge that writes can be changed."""
    return base_config() | {"judge": {"method": "additive"}}


def reward_config() -> dict[str, Any]:
    """A config in which the keys of a reward model can be changed."""
    model = base_config()["model"] | {"judge": "some/rewards"}
    return base_config() | {"model": model, "judge": {"method": "reward_model", "head": 0}}


def implicit_config() -> dict[str, Any]:
    """A config in which the keys of an implicit reward can be changed."""
    return base_config() | {"judge": {"method": "implicit_reward", "reference": "some/reference"}}


def completions_config() -> dict[str, Any]:
    """A config in which the keys of scored completions can be changed."""
    source = {"path": "pairs.jsonl", "fields": {"completions": "completions"}}
    return imported_config() | {"pairs": {"sources": [source]}, "evaluate": {"authored": [source]}}


def imported_config() -> dict[str, Any]:
    """A config in which the keys of imported pairs can be changed."""
    return base_config() | {"pairs": {"sources": [{"path": "pairs.jsonl"}]}, "rounds": 1}


_COMPLETIONS = ("completion_text", "completion_score", "completion_model")
ELSEWHERE = {
    "openai": (
        openai_config,
        (
            "engine.base_url",
            "engine.served_model",
            "engine.api_key_env",
            "engine.concurrency",
            "engine.requests_per_minute",
            "engine.input_price",
            "engine.output_price",
        ),
    ),
    "simpo": (simpo_config, ("loss.gamma",)),
    "likelihood": (lambda: base_config() | {"conflict": {"weighting": "none"}}, ("loss.nll",)),
    "vllm": (
        vllm_config,
        (
            "engine.enforce_eager",
            "engine.gpu_memory_utilization",
            "engine.cpu_kv_cache_gib",
            "engine.max_num_seqs",
            "engine.tensor_parallel",
            "generate.prefix_caching",
        ),
    ),
    "additive": (additive_config, ("judge.votes", "judge.sampling.")),
    "pairwise": (lambda: base_config() | {"judge": {"method": "pairwise"}}, ("judge.opponents",)),
    "reward_model": (reward_config, ("judge.head", "judge.max_length")),
    "implicit_reward": (implicit_config, ("judge.reference", "judge.beta")),
    "panel": (lambda: base_config() | {"judge": {"panel": {"a": {}, "b": {}}}}, ("judge.combine",)),
    "sigma": (lambda: base_config() | {"pairs": {"strategy": "sigma"}}, ("pairs.sigmas",)),
    "all": (lambda: base_config() | {"pairs": {"strategy": "all"}}, ("pairs.cap",)),
    "allo and orthalign": (allo_sequence_config, ("train.allo.factor_bytes",)),
    "ray": (lambda: base_config() | {"execution": {"on": "ray"}}, ("execution.ray_address",)),
    "processes": (parallel_config, ("train.sharding", "execution.peer_minutes")),
    "completions": (
        completions_config,
        (
            *(f"pairs.sources.0.fields.{key}" for key in _COMPLETIONS),
            *(f"evaluate.authored.0.fields.{key}" for key in _COMPLETIONS if key != "completion_model"),
        ),
    ),
    "imported": (imported_config, ("pairs.dev_fraction", "pairs.test_fraction")),
}
"""Keys that the base config has no use for, in a config that has."""

OWN = {
    "train.allo.": allo_config,
    "train.lora.": lora_config,
    "train.processes": lora_config,
    "train.nodes": lora_config,
    "train.language_surgery": lora_config,
}


def every_key() -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """(dotted key, whether it is semantic, the base config with this key changed), but for those that need another config."""
    elsewhere = (*OWN, *_ONE_SIDED, *(key for _, keys in ELSEWHERE.values() for key in keys))
    return ((k, s, c) for k, s, c in _changes(base_config()) if not k.startswith(elsewhere))


def every_own_key(prefix: str) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """The same of keys in `OWN`, in a config of their own."""
    elsewhere = tuple(key for _, keys in ELSEWHERE.values() for key in keys)
    changes = _changes(OWN[prefix]())
    return ((k, s, c) for k, s, c in changes if k.startswith(prefix) and not k.startswith(elsewhere))


def every_key_elsewhere(name: str) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """The same of keys in `ELSEWHERE`."""
    config, keys = ELSEWHERE[name]
    return ((k, s, c) for k, s, c in _changes(config()) if k.startswith(keys))


def every_one_sided_key() -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """The same of one-sided compression."""
    return ((k, s, c) for k, s, c in _changes(one_sided_config()) if k in _ONE_SIDED)


def _changes(base: dict[str, Any]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    config = RunConfig.model_validate(base)
    for key, field, value in _leaves(config, "", False):
        other = _SPECIAL[key] if key in _SPECIAL else _other(field.annotation, value, key)
        if other is None:  # only one value is valid
            continue
        changed = config.model_dump(mode="json")
        target: Any = changed
        *sections, last = key.split(".")
        for section in sections:
            target = target[int(section)] if section.isdigit() else target[section]
        target[last] = other
        yield key, not _execution[key], changed


_execution: dict[str, bool] = {}


def _leaves(section: BaseModel, prefix: str, execution: bool) -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        above = execution or is_execution(field)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{key}.", above)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from _leaves(item, f"{key}.{index}.", above)
        else:
            _execution[key] = above
            yield key, field, value


def _other(annotation: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _other(next(a for a in arguments if a is not NoneType), value, key)
    if origin is Annotated:
        return _other(arguments[0], value, key)
    if origin is Literal:
        return next((a for a in arguments if a != value), None)
    if annotation is bool:
        return not value
    if annotation is int:
        return (value or 0) + 1
    if annotation is float:
        return value / 2 if value else 0.25
    if annotation is str:
        return f"{value or ''}x"
    if annotation is Path:
        return "elsewhere"
    if origin is list:
        return [*(value or []), "x"]
    raise AssertionError(f"tests/faults/every_key.py knows no other value for {key}: {annotation}")
