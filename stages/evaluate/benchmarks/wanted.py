"""What is wanted of the harness, and what a task is, as plain values that pass between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.files import sha256

_LEFT_OUT = ("__pycache__", ".ipynb_checkpoints", ".git")


@dataclass(frozen=True)
class Wanted:
    """`evaluate.tasks` and `evaluate.benchmarks` of a run. run_languages: its codes, to know them in the names of tasks."""

    tasks: tuple[str, ...]
    folder: Path | None
    trust_code: bool
    fewshot: int | None
    limit: int | None
    chat_template: bool
    languages: dict[str, str] = field(default_factory=dict)
    run_languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task that gives figures: a leaf of what was asked for (`asked`, itself or a group or tag). questions: that it has; asked_of: of
    these, how many are asked. language: BCP 47, und where nothing says it. keeps_none: it says 0 solved examples, whatever is asked for."""

    name: str
    asked: str
    language: str
    questions: int
    asked_of: int
    keeps_none: bool = False


def wanted_of(config: RunConfig) -> Wanted:
    """Of a config. Raises UserError where the folder is none."""
    evaluate, benchmarks = config.evaluate, config.evaluate.benchmarks
    folder = None if benchmarks.folder is None else Path(benchmarks.folder).absolute()
    if folder is not None and not folder.is_dir():
        raise UserError("There is no such folder of tasks", where=f"evaluate.benchmarks.folder: {benchmarks.folder}")
    return Wanted(
        tuple(evaluate.tasks),
        folder,
        benchmarks.trust_code,
        benchmarks.fewshot,
        benchmarks.limit,
        benchmarks.chat_template,
        dict(benchmarks.languages),
        tuple(config.languages.codes),
    )


def folder_files(folder: Path) -> dict[str, str]:
    """Every file of a folder of tasks -> its SHA-256: task files, data and code alike change results."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not set(path.parts) & set(_LEFT_OUT))
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
