"""Reading the YAML config: line numbers in errors, suggestions for misspelt keys, --set overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig
from schemas.errors import UserError

_Loc = tuple[str | int, ...]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated config of a YAML file with `a.b=c` overrides applied.

    Raises UserError naming the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            "There is no such config file", where=str(path), fix="`python -m pipeline init` writes a starter one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config cannot be read: {error}", where=str(path)) from error
    values, lines = parse(text, path)
    for override in overrides:
        _apply(values, override)
    return validate(values, lines, path)


def validate(values: dict[str, Any], lines: dict[_Loc, int], path: Path) -> RunConfig:
    """Validate parsed values; the first problem becomes a UserError."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_explain(dict(problem), lines, path) for problem in error.errors()]
    raise UserError(" ".join(problems[:3]) + (f" And {len(problems) - 3} more problems." if len(problems) > 3 else ""))


def parse(text: str, path: Path) -> tuple[dict[str, Any], dict[_Loc, int]]:
    """YAML text to values and the line of every key. Raises UserError on broken YAML or a repeated key."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[_Loc, int] = {}
        if node is not None:
            _walk(node, (), lines, path)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"This is not valid YAML: {getattr(error, 'problem', error)}", where=where) from error
    if not isinstance(values, dict):
        raise UserError("The config must be a mapping of keys to values", where=str(path))
    return values, lines


def _walk(node: yaml.Node, loc: _Loc, lines: dict[_Loc, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*loc, key.value)
            if where in lines:
                raise UserError(f"The key {key.value!r} is given twice", where=f"{path}:{key.start_mark.line + 1}")
            lines[where] = key.start_mark.line + 1
            _walk(value, where, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*loc, index)] = value.start_mark.line + 1
            _walk(value, (*loc, index), lines, path)


def _apply(values: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from error
    target: Any = values
    *parents, last = key.split(".")
    for parent in parents:
        target = (
            target[int(parent)] if isinstance(target, list) and parent.isdigit() else _child(target, parent, override)
        )
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise UserError(f"--set {override!r}: {'.'.join(parents)} is not a section")


def _child(target: Any, key: str, override: str) -> Any:
    if not isinstance(target, dict):
        raise UserError(f"--set {override!r}: {key} is not inside a section")
    if target.get(key) is None:
        target[key] = {}
    return target[key]


def _explain(problem: dict[str, Any], lines: dict[_Loc, int], path: Path) -> str:
    loc: _Loc = tuple(problem["loc"])
    key = ".".join(str(p) for p in loc)
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = f"{path}:{line}" if line else str(path)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}."
        return f"There is no config key {key!r} ({where}); {hint}"
    if problem["type"] == "missing":
        return f"The config key {key!r} is missing ({where})."
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem.get("input"), (dict, list, BaseModel)) else f" (got {problem.get('input')!r})"
    return f"{key}: {message}{shown} ({where})." if key else f"{message} ({where})."


def _fields_at(loc: _Loc) -> list[str]:
    model: Any = RunConfig
    for step in loc:
        if isinstance(step, int):
            continue
        model = _section(model.model_fields[step].annotation) if step in getattr(model, "model_fields", {}) else None
        if model is None:
            return []
    return sorted(model.model_fields)


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg)) is not None), None)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML: a run repeated from it alone is the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
