"""A worker process: takes orders from the driver, computes shards, commits the parts itself.

It keeps loaded engines between orders, so neighbouring stages with the same model load it once. It dies with the
driver (PR_SET_PDEATHSIG) and lives in a process group of its own, so that Ctrl-C reaches the driver alone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.commit import TableWriter, commit_part, keep_refused, part_name, retract_part, retract_refused
from pipeline.rundir import RunDir
from pipeline.storage import storage_error
from pipeline.writer import Writer
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import FileRecord, PartManifest, ShardRange
from stages.contract import Account, Context, Drop, ModelRef, Part, Rows, Shard, Stopped
from stages.spec import StageSpec
from stages.text.visible import visible

_PR_SET_PDEATHSIG = 1
_PROGRESS_SECONDS = 0.2
_MAX_ROWS_PER_FILE = 1_000_000
_LIMITS = "limits"


@dataclass(frozen=True)
class Order:
    """One stage of one round, as the driver sends it to a worker."""

    spec: StageSpec
    round: int
    config: RunConfig
    root: Path
    fingerprint: str
    inputs: dict[str, list[FileRecord]]
    models: dict[str, ModelRef]
    shards: dict[int, ShardRange]
    limits: dict[str, int] = field(default_factory=dict)


class Line:
    """The worker's end of the pipe: messages of the writer's thread and of the stage's do not mix."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: tuple[Any, ...]) -> None:
        with self._lock:
            self._connection.send(message)

    def recv(self) -> Any:
        return self._connection.recv()


class PipeProgress:
    """Progress that goes to the driver, at most five times a second."""

    def __init__(self, connection: Line) -> None:
        self._connection = connection
        self._amount = 0
        self._rates: dict[str, float] = {}
        self._sent = 0.0

    def total(self, amount: int, unit: str) -> None:
        self.flush()
        self._connection.send(("total", amount, unit))

    def advance(self, amount: int = 1, **rates: float) -> None:
        self._amount += amount
        self._rates.update(rates)
        if time.monotonic() - self._sent >= _PROGRESS_SECONDS:
            self.flush()

    def note(self, message: str) -> None:
        self._connection.send(("note", message))

    def flush(self) -> None:
        if self._amount or self._rates:
            self._connection.send(("progress", self._amount, self._rates))
        self._amount, self._rates, self._sent = 0, {}, time.monotonic()


def main(connection: Connection, driver: int, log: Path, environment: dict[str, str], stop: Any) -> None:
    """Entry point of the worker process. stop: a shared byte, not 0 when the run was asked to stop."""
    _die_with(driver)
    os.environ.update(environment)
    _log_to(log)
    shared: dict[str, Any] = {}
    line = Line(connection)
    try:
        while (message := line.recv()) is not None:
            _carry_out(message, line, stop, shared)
    except (EOFError, BrokenPipeError):
        return
    finally:
        for resource in shared.values():
            if hasattr(resource, "close"):
                resource.close()


def _carry_out(order: Order, connection: Line, stop: Any, shared: dict[str, Any]) -> None:
    progress = PipeProgress(connection)
    try:
        run = _run_shards if order.spec.kind == "shard" else _run_whole
        run(order, _context(order, progress, stop, shared), connection)
        progress.flush()
        connection.send(("limits", shared[_LIMITS]))
        connection.send(("done", bool(stop.value)))
    except Stopped:
        connection.send(("done", True))
    except UserError as error:
        connection.send(("error", "user", error, ""))
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", order.spec.name)
        if (disk := storage_error(error, order.root)) is not None:
            connection.send(("error", "user", disk, ""))
            return
        connection.send(("error", "bug", f"{type(error).__name__}: {error}", traceback.format_exc()))


def _context(order: Order, progress: PipeProgress, stop: Any, shared: dict[str, Any]) -> Context:
    rundir = RunDir(order.root)
    folder = None
    if order.spec.kind == "artifact":
        folder = rundir.artifacts(order.spec, order.round)
        files.make_folder(folder)
    limits: dict[str, int] = shared.setdefault(_LIMITS, {})  # one for the worker's life, like the engine that holds it
    limits.update(order.limits)
    files.make_folder(rundir.temporary)
    return Context(
        config=order.config,
        round=order.round,
        inputs={name: [order.root / f.path for f in found] for name, found in order.inputs.items()},
        models=order.models,
        progress=progress,
        folder=folder,
        scratch=rundir.temporary,
        shared=shared,
        stop=lambda: bool(stop.value),
        limits=limits,
    )


def _stage(spec: StageSpec) -> Any:
    module, name = spec.entry.split(":")
    return getattr(importlib.import_module(module), name)()


def _run_shards(order: Order, ctx: Context, connection: Line) -> None:
    rundir, spec = RunDir(order.root), order.spec
    source = order.inputs[spec.reads[0].rstrip("?")]
    begun = time.monotonic()

    def shards() -> Iterator[Shard]:
        while True:
            connection.send(("want",))
            index = connection.recv()
            if index is None or ctx.stop():
                return
            yield Shard(index, read_range(order.root, source, order.shards[index]))

    def commit(part: Part, seconds: float, limits: dict[str, int]) -> None:
        manifest = _commit(rundir, order, part, seconds)
        connection.send(("limits", limits))
        connection.send(("committed", manifest))

    with Writer(commit) as writer:
        for part in _stage(spec).run(ctx, shards()):
            now = time.monotonic()
            writer.put(part, now - begun, dict(ctx.limits))
            begun = now  # waiting for the part before to be written is time of the next one


def _commit(rundir: RunDir, order: Order, part: Part, seconds: float) -> PartManifest:
    spec, records = order.spec, []
    if missing := set(spec.writes) - set(part.tables):
        raise ValueError(f"{spec.name}: part {part.index} lacks the tables {sorted(missing)}")
    retract_part(rundir, spec, order.round, part.index)
    for table, data in part.tables.items():
        writer = TableWriter(rundir, rundir.table(spec, order.round, table) / part_name(part.index), table)
        writer.write(data)
        records.append(writer.close())
    return commit_part(
        rundir,
        spec,
        order.round,
        part.index,
        order.fingerprint,
        records=records,
        drops=part.drops,
        tallies=part.tallies,
        stats=part.stats,
        seconds=seconds,
    )


def _run_whole(order: Order, ctx: Context, connection: Line) -> None:
    """TableStage or ArtifactStage: everything it writes is one commit."""
    rundir, spec = RunDir(order.root), order.spec
    begun = time.monotonic()
    retract_part(rundir, spec, order.round, 0)
    retract_refused(rundir, spec, order.round)
    writers: dict[str, TableWriter] = {}
    rows: dict[str, int] = {}
    parts: dict[str, int] = {}
    records: list[FileRecord] = []
    account: Account | None = None
    for item in _stage(spec).run(ctx):
        if isinstance(item, Account):
            account = item
            break
        _append(item, rundir, order, writers, rows, parts, records)
    if account is None:
        raise ValueError(f"{spec.name} ended without an account")
    if account.refusal is not None:
        keep_refused(rundir, spec, order.round, account.drops)
        raise account.refusal
    if missing := set(spec.writes) - set(parts):
        raise ValueError(f"{spec.name} wrote no {sorted(missing)}, not even an empty table")
    records += [writer.close() for writer in writers.values()]
    for artifact in account.artifacts:
        files.fsync(artifact)
        records.append(files.record(order.root, artifact))
    if ctx.folder is not None:
        for folder in {parent for a in account.artifacts for parent in a.parents if parent.is_relative_to(ctx.folder)}:
            files.fsync(folder)
    drops: list[Drop] = account.drops
    manifest = commit_part(
        rundir,
        spec,
        order.round,
        0,
        order.fingerprint,
        records=records,
        drops=drops,
        tallies=account.tallies,
        stats=account.stats,
        seconds=time.monotonic() - begun,
    )
    connection.send(("committed", manifest))


def _append(
    item: Rows,
    rundir: RunDir,
    order: Order,
    writers: dict[str, TableWriter],
    rows: dict[str, int],
    parts: dict[str, int],
    records: list[FileRecord],
) -> None:
    """Write rows to the table's open part; start the next part when it is large."""
    if item.table not in order.spec.writes:
        raise ValueError(f"{order.spec.name} may not write {item.table}")
    if item.table in writers and rows[item.table] >= _MAX_ROWS_PER_FILE:
        records.append(writers.pop(item.table).close())
    if item.table not in writers:
        index = parts.get(item.table, 0)
        parts[item.table], rows[item.table] = index + 1, 0
        folder = rundir.table(order.spec, order.round, item.table)
        writers[item.table] = TableWriter(rundir, folder / part_name(index), item.table)
    writers[item.table].write(item.data)
    rows[item.table] += item.data.num_rows


def read_range(root: Path, records: list[FileRecord], wanted: ShardRange) -> Any:
    """Rows [start, stop) of a table given as its files in order; reads only the files they lie in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pieces, offset = [], 0
    for file in records:
        count = file.rows or 0
        start, stop = max(wanted.start - offset, 0), min(wanted.stop - offset, count)
        if start < stop:
            pieces.append(pq.read_table(root / file.path, partitioning=None).slice(start, stop - start))
        offset += count
    table = pa.concat_tables(pieces)
    if table.num_rows != wanted.stop - wanted.start:
        raise ValueError(f"shard {wanted.index}: {table.num_rows} rows instead of {wanted.stop - wanted.start}")
    return table


def _die_with(driver: int) -> None:
    os.setsid()
    # Schedulers signal every process of a job: the driver decides. A handler, since SIG_IGN would be inherited by what
    # the stage starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)


def _log_to(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Harmless(logging.Formatter):
    """Messages may quote generated text, and logs are read in terminals."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
