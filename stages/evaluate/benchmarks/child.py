"""The process that the harness lives in: it says what the tasks are, or measures a model on them, task after task.

A process of its own, since the harness seeds every generator, sets up logging and imports what tasks name, and since memory of a model is
only sure to come back when a process ends.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

from schemas.config import RunConfig
from schemas.errors import UserError, first_line
from stages.contract import ModelRef
from stages.evaluate.benchmarks.wanted import Wanted

ENVIRONMENT: Mapping[str, str] = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
BOOTSTRAPS = 1000
"""Of metrics that have no standard error in closed form; the harness's own 100,000 take minutes a task."""


@dataclass(frozen=True)
class Described:
    """tasks: `wanted.Task`s; harness: its version, of which figures depend."""

    tasks: list[Any]
    harness: str


@dataclass(frozen=True)
class Progress:
    """share: of the requests of a task that are answered."""

    task: str
    share: float


@dataclass(frozen=True)
class Metric:
    """A metric of a task. values: of every question, by its number in docs, where the metric is their mean; else empty."""

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool
    docs: list[int]
    values: list[float]


@dataclass(frozen=True)
class Measured:
    """A finished task; metrics: the one that the task names first is the first."""

    task: str
    questions: int
    metrics: list[Metric]


@dataclass(frozen=True)
class OutOfMemory:
    """A batch did not fit."""

    why: str


def describe(connection: Connection, wanted: Wanted) -> None:
    """Entry point: sends `Described`, or the UserError that refuses."""

    def said() -> None:
        from stages.evaluate.benchmarks.catalogue import Catalogue

        connection.send(Described(Catalogue(wanted).tasks(), version("lm_eval")))

    _enter(connection, wanted, said)


def measure(
    connection: Connection, wanted: Wanted, model: ModelRef, config: RunConfig, tasks: Sequence[str], batch_size: int
) -> None:
    """Entry point: sends `Progress` and a `Measured` for each of `tasks`; or `OutOfMemory`, or a UserError, and ends."""

    def measured() -> None:
        from stages.evaluate.benchmarks.backend import HuggingFace, Share
        from stages.evaluate.benchmarks.catalogue import Catalogue

        catalogue = Catalogue(wanted)
        share = Share(lambda task, done: connection.send(Progress(task, done)))
        lm = HuggingFace(model, config, batch_size, share)
        for name in tasks:
            share.task = name
            connection.send(said := _measured(lm, catalogue, wanted, name))
            if isinstance(said, OutOfMemory):
                return

    _enter(connection, wanted, measured)


def _enter(connection: Connection, wanted: Wanted, work: Callable[[], None]) -> None:
    logging.disable(logging.WARNING)  # remarks on every task file
    if wanted.folder is not None:
        os.chdir(wanted.folder)  # paths of data in task files are from there
    try:
        if wanted.trust_code:
            sys.path.append(str(wanted.folder or ""))  # its functions may import what lies beside them
        else:
            confine_templates()
        work()
    except BrokenPipeError:
        return
    except UserError as error:
        connection.send(error)


def confine_templates() -> None:
    """Task files are data unless they are trusted: their Jinja templates, which the harness renders as they are, in Jinja's sandbox."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    utils.env = ImmutableSandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    utils.env.filters.update(plain.filters)


def _measured(lm: Any, catalogue: Any, wanted: Wanted, name: str) -> Any:
    from lm_eval import simple_evaluate

    from stages.models.device import is_out_of_memory

    try:
        found = simple_evaluate(
            model=lm,
            tasks=[catalogue.loaded(name)],
            num_fewshot=wanted.fewshot,
            limit=wanted.limit,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=wanted.chat_template,
            task_manager=catalogue.manager,
        )
    except Exception as error:
        if is_out_of_memory(error):
            return OutOfMemory(first_line(error))
        raise UserError(
            f"Task {name} cannot be measured: {type(error).__name__}: {first_line(error)}",
            where="evaluate.tasks",
            fix="Take it out; the worker's log has more. Tasks that are finished are not run again.",
        ) from error
    return Measured(name, len(_numbers(found["samples"][name])), _metrics(found, name))


def _numbers(samples: Sequence[Mapping[str, Any]]) -> set[int]:
    return {int(sample["doc_id"]) for sample in samples}


def _metrics(found: Mapping[str, Any], name: str) -> list[Metric]:
    """What the harness reports of a task, in its order: keys `acc,none` and `acc_stderr,none`."""
    row, better = found["results"][name], found["higher_is_better"].get(name, {})
    metrics = []
    for key, value in row.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = row.get(f"{metric}_stderr,{filter_}")
        docs, values = _by_question(found["samples"][name], metric, filter_, float(value))
        metrics.append(
            Metric(
                metric if filter_ == "none" else f"{metric} ({filter_})",
                float(value),
                float(stderr) if isinstance(stderr, (int, float)) else None,
                better.get(metric) is not False,
                docs,
                values,
            )
        )
    declared = [entry["metric"] for entry in found["configs"][name].get("metric_list") or [] if "metric" in entry]
    order = {str(metric): n for n, metric in enumerate(declared)}
    return sorted(metrics, key=lambda one: order.get(one.name.partition(" (")[0], len(order)))


def _by_question(
    samples: Sequence[Mapping[str, Any]], metric: str, filter_: str, value: float
) -> tuple[list[int], list[float]]:
    """A metric's value of every question; nothing where the task's figure is not their mean (a corpus BLEU, an F1)."""
    mine = [sample for sample in samples if sample["filter"] == filter_ and metric in sample]
    try:
        values = [float(sample[metric]) for sample in mine]
    except (TypeError, ValueError):
        return [], []
    if not values or abs(sum(values) / len(values) - value) > 1e-6 * max(1.0, abs(value)):
        return [], []
    return [int(sample["doc_id"]) for sample in mine], values
