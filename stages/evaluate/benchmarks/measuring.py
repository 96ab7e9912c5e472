"""Both models on every task: a process of the harness for each, a finished task left in a file that a resume finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.errors import UserError
from schemas.ids import content_id
from stages.children import Child, ChildDied, start_child, wait_for
from stages.contract import Context, Drop, ModelRef, Stopped
from stages.evaluate.benchmarks import child as harness
from stages.evaluate.benchmarks.child import Described, Measured, Metric
from stages.evaluate.benchmarks.wanted import Task, Wanted, folder_files, wanted_of
from stages.evaluate.substeps import is_done, once
from stages.models.device import dtype_of

_SIZE = "evaluate.benchmarks.batch_size"
_LISTEN_SECONDS = 1.0
_SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("higher_is_better", pa.bool_()),
        ("docs", pa.list_(pa.int64())),
        ("values", pa.list_(pa.float64())),
    ]
)


def described(wanted: Wanted) -> Described:
    """The tasks of a run, from a process of the harness. Raises UserError for what cannot be run, before any model is looked at."""
    process = start_child(harness.describe, (wanted,), "congrad-tasks", environment=harness.ENVIRONMENT)
    try:
        answer = process.receive()
    except ChildDied as death:
        raise UserError(
            f"lm-evaluation-harness ended by {death.cause} while it read the tasks", where="evaluate.tasks"
        ) from None
    finally:
        process.kill()
    if isinstance(answer, UserError):
        raise answer
    assert isinstance(answer, Described)
    return answer


class Benchmarks:
    """The tasks of one call of the stage. Units of progress: questions."""

    def __init__(self, ctx: Context, roles: dict[str, str]) -> None:
        self._ctx, self._roles, self._wanted = ctx, roles, wanted_of(ctx.config)
        found = described(self._wanted)
        self.tasks: list[Task] = found.tasks
        folder = folder_files(self._wanted.folder) if self._wanted.folder else {}
        config = ctx.config
        self._settings = (
            found.harness,
            folder,
            self._wanted.fewshot,
            self._wanted.limit,
            self._wanted.chat_template,
            config.text.chat_template_kwargs if self._wanted.chat_template else {},
            str(dtype_of(config)),
        )

    @property
    def left(self) -> int:
        """Questions that are not answered yet."""
        return sum(task.asked_of for model in self._roles for task in self._unfinished(model))

    def drops(self) -> list[Drop]:
        """Questions beyond evaluate.benchmarks.limit. Unit `question`; reason not_sampled."""
        return [
            Drop("question", f"{task.name}:{number}", task.language, "not_sampled", f"more than {task.asked_of}")
            for task in self.tasks
            for number in range(task.asked_of, task.questions)
        ]

    def languages(self) -> Iterator[str]:
        """Of every question, asked or not."""
        return (task.language for task in self.tasks for _ in range(task.questions))

    def measured(self, model: str) -> dict[str, list[Metric]]:
        """task -> its metrics, the one that it names first in front. Raises Stopped."""
        if unfinished := self._unfinished(model):
            self._run(model, unfinished)
        return {task.name: self._stored(model, task) for task in self.tasks}

    def _run(self, model: str, tasks: Sequence[Task]) -> None:
        """One process after another until all tasks are measured; another only when memory ran out."""
        left, told = list(tasks), dict.fromkeys((task.name for task in tasks), 0)
        while left:
            size = self._ctx.limited(_SIZE, self._ctx.config.evaluate.benchmarks.batch_size)
            process = start_child(
                harness.measure,
                (self._wanted, self._ref(model), self._ctx.config, [task.name for task in left], size),
                "congrad-benchmarks",
                environment=harness.ENVIRONMENT,
            )
            try:
                self._listen(process, model, left, told)
            except ChildDied as death:
                if not death.killed:
                    raise UserError(
                        f"lm-evaluation-harness ended by {death.cause} at task {left[0].name}",
                        where="evaluate.tasks",
                        fix="The worker's log has its last words. Finished tasks are not run again.",
                    ) from None
                self._shrink(size, death.cause)
            finally:
                process.kill()

    def _listen(self, process: Child, model: str, left: list[Task], told: dict[str, int]) -> None:
        """Take in what it says until nothing is left, or memory ran out. Raises ChildDied, Stopped, UserError."""
        while left:
            wait_for([process], _LISTEN_SECONDS)
            if self._ctx.stop():
                raise Stopped
            for message in process.messages():
                if isinstance(message, UserError):
                    raise message
                if isinstance(message, harness.OutOfMemory):
                    self._shrink(self._ctx.limited(_SIZE, self._ctx.config.evaluate.benchmarks.batch_size), message.why)
                    return
                task = left[0]
                finished = isinstance(message, Measured)
                done = task.asked_of if finished else int(0.99 * task.asked_of * message.share)
                self._ctx.progress.advance(max(0, done - told[task.name]))
                told[task.name] = max(done, told[task.name])
                if finished:
                    once(self._path(model, task), self._identity(model, task), partial(_table, message))
                    left.pop(0)
                if not left:
                    return

    def _shrink(self, size: int, why: str) -> None:
        if size == 1:
            raise UserError(
                f"A benchmark's question does not fit in memory, even alone: {why}",
                where="evaluate.tasks",
                fix="Take the task out, ask with fewer examples (evaluate.benchmarks.fewshot), or use a larger device.",
            )
        self._ctx.limit(_SIZE, size // 2, why)

    def _unfinished(self, model: str) -> list[Task]:
        return [task for task in self.tasks if not is_done(self._path(model, task), self._identity(model, task))]

    def _stored(self, model: str, task: Task) -> list[Metric]:
        table = once(self._path(model, task), self._identity(model, task), _missing)
        return [
            Metric(r["metric"], r["value"], r["stderr"], r["higher_is_better"], r["docs"], r["values"])
            for r in table.to_pylist()
        ]

    def _ref(self, model: str) -> ModelRef:
        return self._ctx.models[self._roles[model]]

    def _path(self, model: str, task: Task) -> Path:
        return self._ctx.own_folder / "benchmarks" / f"{model}-{content_id(task.name)[:16]}.parquet"

    def _identity(self, model: str, task: Task) -> str:
        return content_id("benchmark", self._ref(model).digest, task.name, task.asked_of, self._settings)


def _missing() -> Any:
    raise AssertionError("every task was measured")


def _table(measured: Measured) -> pa.Table:
    rows = [
        {
            "metric": one.name,
            "value": one.value,
            "stderr": one.stderr,
            "higher_is_better": one.higher_is_better,
            "docs": one.docs,
            "values": one.values,
        }
        for one in measured.metrics
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)
