"""Tasks by name, as lm-evaluation-harness has them: found, refused where they cannot be run here, loaded with their data.

Imported only where the harness is (a process of its own): it takes a second to import, and ten to read its 14,000 task files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from schemas.errors import UserError, first_line
from schemas.languages import standard
from stages.evaluate.benchmarks.language import language_of
from stages.evaluate.benchmarks.wanted import Task, Wanted

_WHERE = "evaluate.tasks"
_CODE = "a function in Python"
_NETWORK = (
    "connection",
    "offline",
    "couldn't reach",
    "timed out",
    "name resolution",
    "localentrynotfound",
    "max retries",
)


class Catalogue:
    """The tasks of a run. Raises UserError, before any model is loaded, for names that there are not and tasks that cannot be run."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.manager = _manager(wanted)
        self._loaded: dict[str, tuple[str, Any]] = {}
        for name in wanted.tasks:
            self._refuse(name)
        for name in wanted.tasks:
            self._load(name)
        unknown = sorted(set(wanted.languages) - set(self._loaded) - set(wanted.tasks))
        if unknown:
            raise UserError(
                f"evaluate.benchmarks.languages names {unknown[0]}, which is none of the tasks",
                where="evaluate.benchmarks.languages",
                fix=f"The tasks are {_some(self._loaded)}.",
            )

    def tasks(self) -> list[Task]:
        """All leaves, in the order asked for."""
        return [self._facts(name, asked, task) for name, (asked, task) in self._loaded.items()]

    def loaded(self, name: str) -> Any:
        """The harness's task object."""
        return self._loaded[name][1]

    def _facts(self, name: str, asked: str, task: Any) -> Task:
        declared = self._wanted.languages.get(name, self._wanted.languages.get(asked))
        config = task.dump_config()
        said = (_text(config.get("metadata"), "language"), _text(config, "dataset_name"), name)
        language = declared and standard(declared)
        questions = len(task.eval_docs)
        limit = self._wanted.limit
        asked_of = questions if limit is None else min(limit, questions)
        language = language or language_of(filter(None, said), self._wanted.run_languages)
        # the harness keeps a 0 of the task's own, and takes any other number from whoever asks
        keeps_none = bool(self._wanted.fewshot) and config.get("num_fewshot") == 0
        return Task(name, asked, language, questions, asked_of, keeps_none)

    def _refuse(self, name: str) -> None:
        """Before anything of the task is loaded: loading runs the functions that it names."""
        index = self.manager.task_index
        if name not in index:
            raise _unknown(name, index, self._wanted.folder)
        for leaf in self._leaves(name, set()):
            entry = index[leaf]
            own = self._wanted.folder is not None and _lies_in(entry.yaml_path, self._wanted.folder)
            if (entry.cfg or {}).get("unsafe_code"):
                raise UserError(
                    f"Task {leaf} runs programs that the model writes, which is not done here",
                    where=_where(name, leaf),
                    fix="Take it out. `lm_eval` runs it on an exported model (congrad export --what model), in a sandbox of yours.",
                )
            if own and not self._wanted.trust_code and _CODE in _kinds(entry.yaml_path):
                raise UserError(
                    f"Task {leaf} runs Python of its folder ({entry.yaml_path.name} names a function or a class)",
                    where=_where(name, leaf),
                    fix="Read it, and set evaluate.benchmarks.trust_code: true.",
                )

    def _leaves(self, name: str, seen: set[str]) -> Iterator[str]:
        """Names of all that is run for a name, groups and tags taken apart; the group's own file counts too."""
        entry = self.manager.task_index.get(name)
        if entry is None or name in seen:
            return
        seen.add(name)
        if entry.yaml_path is not None:
            yield name
        if entry.kind.name == "GROUP":
            for below in _members((entry.cfg or {}).get("task")):
                yield from self._leaves(below, seen)
        elif entry.kind.name == "TAG":
            for below in sorted(entry.tags):
                yield from self._leaves(below, seen)

    def _load(self, name: str) -> None:
        """With its data, which the harness fetches from the hub when it is not in the cache."""
        try:
            found = self.manager.load([name])["tasks"]
        except Exception as error:  # data sets, task files and their functions raise anything
            raise _unloadable(name, error) from error
        for leaf, task in found.items():
            if leaf in self._loaded:
                raise UserError(
                    f"Task {leaf} is asked for twice, by {self._loaded[leaf][0]} and by {name}", where=_WHERE
                )
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = (
                    "runs programs that the model writes"
                    if getattr(task, "UNSAFE_CODE", False)
                    else "has images or sound"
                )
                raise UserError(
                    f"Task {leaf} {what}, which is not done here", where=_where(name, leaf), fix="Take it out."
                )
            if not len(task.eval_docs):
                raise UserError(f"Task {leaf} has no questions", where=_where(name, leaf))
            self._loaded[leaf] = name, task


def _members(listed: Any) -> Iterator[str]:
    """Names in the `task` of a group: as they stand, with settings of their own, or in groups that are written out in it."""
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from _members([item[key] for key in ("task", "group") if key in item])
        elif isinstance(item, list):
            yield from _members(item)


def _manager(wanted: Wanted) -> Any:
    """Of the folder alone where it has all tasks and they are no groups: reading the harness's own takes ten seconds."""
    if wanted.folder is not None:
        own = TaskManager(include_path=str(wanted.folder), include_defaults=False)
        if all((entry := own.task_index.get(name)) and entry.kind.name in ("TASK", "PY_TASK") for name in wanted.tasks):
            return own
    return TaskManager(include_path=None if wanted.folder is None else str(wanted.folder))


def _unknown(name: str, index: Iterable[str], folder: Path | None) -> UserError:
    near = difflib.get_close_matches(name, list(index), 3, 0.7)
    broken = _broken(name, folder)
    fix = f"Did you mean {' or '.join(near)}? " if near else ""
    fix += "`lm_eval ls tasks` lists all names; tasks of your own need evaluate.benchmarks.folder."
    return UserError(f"lm-evaluation-harness has no task {name!r}{broken}", where=_WHERE, fix=fix)


def _broken(name: str, folder: Path | None) -> str:
    """Why a task file of the folder is none, of the one that has the task's name if there is such, else of the first: the harness passes them
    by in silence."""
    reasons = {}
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        if why := _unreadable(path, ()):
            reasons[path] = why
    own = next((path for path in reasons if _says(path, name)), None)
    first = own or next(iter(reasons), None)
    return f" ({reasons[first]})" if first else ""


def _unreadable(path: Path, through: tuple[Path, ...]) -> str:
    """Why a task file, or one that it includes, cannot be read. through: those that include it."""
    try:
        config = _read(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"{path.name} cannot be read: {first_line(error)}"
    if not isinstance(config, dict):
        return f"{path.name} is no mapping of keys to values"
    for other in _included(config):
        if not isinstance(other, str):
            return f"{path.name} includes {other!r}, which is no name of a file"
        target = path.parent / other
        if target.resolve() in (path.resolve(), *through):
            return f"{path.name} includes {other}, which includes it"
        if not target.is_file():
            return f"{path.name} includes {other}, and there is no such file beside it"
        if why := _unreadable(target, (*through, path.resolve())):
            return f"{path.name} includes {other}: {why}"
    return ""


def _says(path: Path, name: str) -> bool:
    """Whether a task file, which may be broken, is of that name."""
    try:
        config = _read(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return path.stem == name
    return isinstance(config, dict) and config.get("task") == name


def _included(config: Any) -> list[Any]:
    included = config.get("include", []) if isinstance(config, dict) else []
    return included if isinstance(included, list) else [included]


def _unloadable(name: str, error: Exception) -> UserError:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    said = " ".join(f"{type(one).__name__} {one}" for one in chain).lower()
    if (missing := next((one for one in chain if isinstance(one, ModuleNotFoundError)), None)) is not None:
        what = f"the package {missing.name}, which is" if missing.name else "packages that are"
        return UserError(
            f"Task {name} needs {what} not installed: {first_line(missing)}",
            where=_WHERE,
            fix="Install what it names, or take the task out.",
        )
    if "dataset scripts are no longer supported" in said or "trust_remote_code" in said:
        return UserError(
            f"The data of task {name} is a program, which the datasets package no longer runs",
            where=_WHERE,
            fix="Take the task out, or write a task file of your own on a copy of its data (evaluate.benchmarks.folder).",
        )
    if any(word in said for word in _NETWORK):
        return UserError(
            f"The data of task {name} is not on this machine and cannot be fetched: {first_line(error)}",
            where=_WHERE,
            fix="Load it once where there is a network (the cache is HF_HOME), or use task files on local data (evaluate.benchmarks.folder).",
        )
    return UserError(
        f"Task {name} cannot be loaded: {type(error).__name__}: {first_line(error)}",
        where=_WHERE,
        fix="Check its task file and its data; `lm_eval --tasks NAME --limit 1` on a small model says the same.",
    )


class _Loader(yaml.SafeLoader):
    """Reads a task file without importing what it names."""


_Loader.add_constructor("!function", lambda loader, node: _Function())


class _Function:
    """Where a task file names one."""


def _read(path: Path) -> Any:
    loader = _Loader(path.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _kinds(path: Path, seen: frozenset[Path] = frozenset()) -> set[str]:
    """`_CODE` if the file, or one it includes, names a function or a class."""
    path = path.resolve()
    if path in seen:
        return set()
    config = _read(path)
    found = {_CODE} if _names_code(config) else set()
    for other in _included(config):
        found |= _kinds(path.parent / other, seen | {path})
    return found


def _names_code(value: Any) -> bool:
    if isinstance(value, _Function):
        return True
    if isinstance(value, dict):
        return "class" in value or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def _lies_in(path: Path | None, folder: Path) -> bool:
    return path is not None and path.resolve().is_relative_to(folder.resolve())


def _where(name: str, leaf: str) -> str:
    return _WHERE if name == leaf else f"{_WHERE}: {name}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _text(config: Any, key: str) -> str:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, str) else ""
