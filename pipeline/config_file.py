"""Reading the YAML config: line numbers in errors, suggestions for misspelt keys, --set overrides."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig
from schemas.config.gone import instead_of
from schemas.config.used import Useless
from schemas.errors import UserError
from schemas.paths import expanded, refuse_undecodable
from schemas.secrets import keep_secret
from stages.data import PREFIX, data_path, read_data
from stages.source_columns import not_utf8
from stages.text.messages import storable

_OPENS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_UNKNOWN = "extra_forbidden"
_NAME_TAG = "tag:yaml.org,2002:str"
_CLOSES = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_OTHER_BASE = re.compile(r"[-+]?(?:0[0-7_]+|[0-9][0-9_]*(?::[0-9]+)+(?:\.[0-9_]*)?)")
"""A number that YAML 1.1 takes for an octal or a sexagesimal one."""
_NO_SPACE = re.compile("[\u00a0\u2000-\u200b\u202f\u205f\u3000]")
_Loc = tuple[str | int, ...]
_MAX_DEPTH = 32
_MAX_DIGITS = 100
_MAX_BYTES = 10_000_000
_MAX_VALUES = 10_000
"""With aliases written out: a config that is larger is a mistake or an attack (billion laughs)."""


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    leaves_out: Callable[[str], None] | None = None,
) -> RunConfig:
    """The validated config of a YAML file, or of a shipped one (`package:configs/demo.yaml`), with `a.b=c` overrides applied.

    run_dir: replaces the config's; a path as it is, not YAML. leaves_out: keys of the file that the overrides give no use are left out, each told in a
    sentence; without it they are refused. Raises UserError naming the file, the line and the key.
    """
    values, lines = parse(_text(path), path)
    for override in overrides:
        _apply(values, override)
        _place_at(lines, override)
    if run_dir is not None:
        values["run_dir"] = str(run_dir)
        lines.pop(("run_dir",), None)
    if leaves_out is not None:
        _leave_out(values, [override.partition("=")[0] for override in overrides], leaves_out)
    config = validate(values, lines, path)
    for engine in filter(None, [*config.evaluate_engines, *(judge.settings.engine for judge in config.judge.judges)]):
        keep_secret(engine.api_key_env, engine.base_url or "")
    if run_dir is not None and (config.run_dir / "run.yaml").exists() and not (config.folder / "run.yaml").exists():
        raise UserError(
            f"--run-dir is the folder that holds runs, and this one is a run itself: {config.folder} would be made in it",
            where=f"--run-dir {config.run_dir}",
            fix=f"To go on with that run: --run-dir {config.run_dir.parent} --set name={config.run_dir.name}.",
        )
    refuse_undecodable(config.folder, "run_dir")
    return config


def _text(path: Path) -> str:
    if str(path).startswith(PREFIX):
        return read_data(str(path))
    try:
        there = path if os.path.exists(path) else Path(expanded(str(path)))
        with there.open("rb") as handle:
            raw = handle.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(
            "There is no such config file",
            where=str(path),
            fix=f"`congrad init` writes a starter one; shipped ones: {', '.join(shipped_configs())}.",
        ) from None
    except IsADirectoryError:
        own = path / "run.yaml"
        fix = f"A run's own config is {own}." if own.is_file() else "Give the file."
        raise UserError("This is a folder, and no config file", where=str(path), fix=fix) from None
    except PermissionError:
        raise UserError("The config may not be read", where=str(path), fix="Change its owner or permissions.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The config cannot be read: {error}", where=str(path)) from error
    if len(raw) > _MAX_BYTES:
        raise UserError(f"The config is larger than {_MAX_BYTES:,} bytes", where=str(path), fix="Is it a config?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}", raw, f"byte {error.start + 1}") from error


def _leave_out(values: dict[str, Any], given: Sequence[str], say: Callable[[str], None]) -> None:
    """Take keys out of the values as long as one has no use and `given` names neither it nor a part of it."""
    while (useless := _useless(values)) is not None and not any(
        f"{useless.key}.".startswith(f"{key}.") or key.startswith(f"{useless.key}.") for key in given
    ):
        *parents, last = useless.key.split(".")
        target: Any = values
        for parent in parents:
            place = _place(target, parent)
            target = target[parent if place is None else place]
        del target[last]
        say(f"{str(useless).rpartition(':')[0]}: it is left out")


def _useless(values: dict[str, Any]) -> Useless | None:
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        causes = (problem.get("ctx", {}).get("error") for problem in error.errors())
        return next((cause for cause in causes if isinstance(cause, Useless)), None)
    return None


def shipped_configs() -> list[str]:
    """Names of the configs in the package, as `run` takes them."""
    return sorted(f"{PREFIX}configs/{path.name}" for path in data_path("configs").glob("*.yaml"))


def validate(values: dict[str, Any], lines: dict[_Loc, int | str], path: Path) -> RunConfig:
    """Validate parsed values; the first problem becomes a UserError."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        found: list[dict[str, Any]] = [dict(problem) for problem in error.errors()]
    gone = {tuple(p["loc"]): why for p in found if p["type"] == _UNKNOWN and (why := instead_of(p["loc"]))}
    problems = [_explain(p, lines, path) for p in found if tuple(p["loc"]) not in gone] + _explain_gone(
        gone, lines, path
    )
    raise UserError(" ".join(problems[:3]) + (f" And {len(problems) - 3} more problems." if len(problems) > 3 else ""))


def parse(text: str, path: Path) -> tuple[dict[str, Any], dict[_Loc, int | str]]:
    """YAML text to values and the line of every key.

    Raises UserError on broken YAML, a tag (!!...), a repeated key, or nesting and aliases without bound.
    """
    values, lines = _read(text, path)
    if not isinstance(values, dict):
        raise UserError("The config must be a mapping of keys to values", where=str(path))
    return values, lines


def _read(text: str, path: Path) -> tuple[Any, dict[_Loc, int | str]]:
    """Any YAML value, as `parse`."""
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
            if depth > 2 * _MAX_DEPTH:  # before anything recurses: the parser would, and in C a stack overflow kills
                raise UserError("This YAML is nested too deep", where=f"{path}:{token.start_mark.line + 1}")
            if isinstance(token, yaml.TagToken):
                where = f"{path}:{token.start_mark.line + 1}"
                raise UserError("There is a YAML tag (!...) here", where=where, fix="Write the plain value.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None, {}
        lines: dict[_Loc, int | str] = {}
        _walk(node, (), lines, path)
        return yaml.SafeLoader("").construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"This is not valid YAML: {problem}", where=where, fix=_fix(error, text)) from error
    except RecursionError:
        raise UserError("This YAML is nested too deep", where=str(path)) from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise UserError(f"A value cannot be read: {error}", where=str(path)) from error


def _fix(error: yaml.YAMLError, text: str) -> str:
    """What to do about broken YAML, as its lines show it; "" where they do not."""
    problem, lines = str(getattr(error, "problem", None)), text.splitlines()
    marks = [mark.line for mark in (getattr(error, name, None) for name in ("context_mark", "problem_mark")) if mark]
    if "escape" in problem:
        return "In double quotes a backslash begins an escape: put the text in single quotes."
    if "'\\t'" in problem:
        return "Indent with spaces, not with tabs."
    if problem.startswith("mapping values"):
        return "Put a text that holds a colon and a space in quotes."
    for number in range(min(marks, default=0), min(max(marks, default=-1) + 1, len(lines))):
        line = lines[number]
        if (found := _NO_SPACE.search(line)) is not None:
            return f"Line {number + 1} has {_named(found)}: write plain spaces."
        before, mark, _ = line.partition(" #")
        if (
            problem.startswith("expected ',' or")
            and mark
            and sum(map(before.count, "{[")) > sum(map(before.count, "}]"))
        ):
            return f"Line {number + 1} ends at its ` #`, where a comment begins: put a text that holds one in quotes."
    return ""


def _named(space: re.Match[str]) -> str:
    return f"U+{ord(space.group()):04X} (a no-break space or the like), which is no space to YAML"


def _walk(node: yaml.Node, loc: _Loc, lines: dict[_Loc, int | str], path: Path) -> None:
    if len(loc) > _MAX_DEPTH or len(lines) > _MAX_VALUES:
        raise UserError(
            f"The config is nested deeper than {_MAX_DEPTH} or has more than {_MAX_VALUES:,} values",
            where=f"{path}:{node.start_mark.line + 1}",
        )
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError("A key of the config is no name", where=f"{path}:{key.start_mark.line + 1}")
            _check_scalar(key, path)
            if key.style is None and (found := _NO_SPACE.search(key.value)) is not None:
                raise UserError(
                    f"The key {key.value!r} has {_named(found)}",
                    where=f"{path}:{key.start_mark.line + 1}",
                    fix="Write plain spaces.",
                )
            if key.tag.endswith(
                ":bool"
            ):  # `on` (of execution) and `no` (Norwegian) are names here; YAML 1.1 takes them for truth values
                key.tag = _NAME_TAG
            where = (*loc, key.value)
            if where in lines:
                raise UserError(f"The key {key.value!r} is given twice", where=f"{path}:{key.start_mark.line + 1}")
            lines[where] = key.start_mark.line + 1
            _walk(value, where, lines, path)
    elif isinstance(node, yaml.ScalarNode):
        _check_scalar(node, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*loc, index)] = value.start_mark.line + 1
            _walk(value, (*loc, index), lines, path)


def _check_scalar(node: yaml.ScalarNode, path: Path) -> None:
    where = f"{path}:{node.start_mark.line + 1}"
    if node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
        raise UserError(f"A number has {len(node.value):,} digits", where=where)
    if node.style is None and node.tag.endswith((":int", ":float")) and _OTHER_BASE.fullmatch(node.value):
        value = yaml.SafeLoader("").construct_object(node)
        if ":" in node.value or value != int(node.value):
            raise UserError(
                f"YAML reads {node.value} as {value} ({'to the base of 60' if ':' in node.value else 'octal'})",
                where=where,
                fix="Write the number that is meant without colons or zeros before it; put a text in quotes.",
            )
    if storable(node.value) != node.value:
        raise UserError(
            "A text holds half of a character (a lone surrogate)",
            where=where,
            fix="YAML does not join JSON's escapes of two halves: write the character itself, or as \\U0001F600.",
        )


def _apply(values: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(f"--set {override!r} is not of the form a.b=value")
    value, _ = _read(text, Path(f"--set {key!r}"))
    target: Any = values
    *parents, last = key.split(".")
    for parent in parents:
        place = _place(target, parent)
        target = _child(target, parent, override) if place is None else target[place]
    if (place := _place(target, last)) is not None:
        target[place] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise UserError(f"--set {override!r}: {'.'.join(parents)!r} is not a section")


def _place_at(lines: dict[_Loc, int | str], override: str) -> None:
    """What the override sets, and all that is in it, is no longer from a line of the file."""
    loc = tuple(
        int(part) if re.fullmatch("[0-9]{1,4}", part) else part for part in override.partition("=")[0].split(".")
    )
    for inner in [inner for inner in lines if inner[: len(loc)] == loc]:
        del lines[inner]
    lines[loc] = override


def _place(target: Any, key: str) -> int | None:
    """The list element that a part of a --set key names; None for what is no list, or has no such element."""
    if not isinstance(target, list) or not re.fullmatch("[0-9]{1,4}", key) or int(key) >= len(target):
        return None
    return int(key)


def _child(target: Any, key: str, override: str) -> Any:
    if not isinstance(target, dict):
        raise UserError(f"--set {override!r}: {key!r} is not inside a section")
    if target.get(key) is None:
        target[key] = {}
    return target[key]


def _explain_gone(gone: dict[_Loc, str], lines: dict[_Loc, int | str], path: Path) -> list[str]:
    """A sentence for all keys that are gone for one reason: a run's own file has them all."""
    sentences = []
    for why in dict.fromkeys(gone.values()):
        keys = [loc for loc in gone if gone[loc] == why]
        names = ", ".join(repr(".".join(map(str, loc))) for loc in keys)
        numbers = ", ".join(str(lines[loc]) for loc in keys if isinstance(lines.get(loc), int))
        sentences.append(f"There is no config key {names} any more ({path}{':' if numbers else ''}{numbers}): {why}.")
    return sentences


def _explain(problem: dict[str, Any], lines: dict[_Loc, int | str], path: Path) -> str:
    loc: _Loc = tuple(problem["loc"])
    key = ".".join(str(p) for p in loc)
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = f"given as {line}" if isinstance(line, str) else f"{path}:{line}" if line else _together(lines, path)
    if problem["type"] == _UNKNOWN:
        known = _fields_at(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}."
        return f"There is no config key {key!r} ({where}); {hint}"
    if problem["type"] == "missing":
        return f"The config key {key!r} is missing ({where})."
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    if problem["type"] == "invalid_key":
        inside = ".".join(map(str, loc[:-1]))
        return f"{inside}: {loc[-1]} is no key ({where}): in braces a comma parts two keys, also that of 1,000 or 0,5."
    if problem["type"] in ("model_type", "dict_type"):
        return f"{key}: {_as_section(loc, given)} ({where})."
    shown = "" if isinstance(given, (dict, list, BaseModel)) else f" (got {reprlib.repr(given)})"
    if problem["type"] == "string_type" and isinstance(given, bool):
        shown += ": YAML reads no, yes, on and off so; put the word in quotes"
    elif problem["type"] == "string_type" and isinstance(given, int | float | date):
        shown = (
            f" (got {given}): YAML reads {'a date' if isinstance(given, date) else 'a number'} here; put it in quotes"
        )
    return f"{key}: {message}{shown} ({where})." if key else f"{message} ({where})."


def _together(lines: dict[_Loc, int | str], path: Path) -> str:
    """Where a problem of several keys is: in the file, and in what was set beside it."""
    settings = list(dict.fromkeys(line for line in lines.values() if isinstance(line, str)))
    return f"{path} with {', '.join(settings)}" if settings else str(path)


def _as_section(loc: _Loc, given: Any) -> str:
    """What to write instead of a value where a section is wanted: that value under the section's one key that must be given."""
    if given is None:
        return "this section is empty: write its keys below it, further in, or leave it out"
    model = _model_at(loc)
    needed = [] if model is None else [name for name, field in model.model_fields.items() if field.is_required()]
    if len(needed) != 1 or not isinstance(given, str | list):
        return "a section is wanted, of keys and values"
    if get_origin(model.model_fields[needed[0]].annotation) is list and isinstance(given, str):
        given = [given]
    shown = yaml.safe_dump({needed[0]: given}, default_flow_style=True, allow_unicode=True, width=2**31).strip()
    name = "" if isinstance(loc[-1], int) else f"{loc[-1]}: "
    return f"a section is wanted, of keys and values: `{name}{shown[:200]}`"


def _fields_at(loc: _Loc) -> list[str]:
    return [] if (model := _model_at(loc)) is None else sorted(model.model_fields)


def _model_at(loc: _Loc) -> Any:
    """The section at a place; None where there is none."""
    model: Any = RunConfig
    named = False  # the step is a name in a mapping of sections, as in judge.criteria
    for step in loc:
        if named or isinstance(step, int):
            named = False
            continue
        if step not in model.model_fields:
            return None
        annotation = model.model_fields[step].annotation
        model, named = _section(annotation), get_origin(annotation) is dict
        if model is None:
            return None
    return None if named else model


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg)) is not None), None)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML: a run repeated from it alone is the same run."""
    values = config.model_dump(mode="json")
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) != values:  # PyYAML writes U+0085 as it is and reads it as a line end
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=120)
    return text
