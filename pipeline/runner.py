"""A worker's work: an order in, prepared parts out. Knows no process and no pipe; `pipeline.worker` is the process around it."""

from __future__ import annotations

import importlib
import logging
import time
import traceback
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.commit import PartBuilder, keep_refused, refused_path
from pipeline.messages import Advanced, Broke, Done, Limited, Noted, Offered, Order, Refused, ToDriver, Total
from pipeline.rundir import RunDir
from pipeline.storage import storage_error
from pipeline.writer import Writer
from schemas import files
from schemas.errors import UserError
from schemas.manifests import FileRecord, ShardRange
from stages.contract import Account, Context, Part, Progress, Shard, ShardStage, Share, Stopped, TableStage
from stages.spec import StageSpec

Take = Callable[[], ShardRange | None]
"""The next shard to compute; None when there is none left."""
Tell = Callable[[ToDriver], None]

_PROGRESS_SECONDS = 0.2
_LIMITS = "limits"


class ToldProgress:
    """Progress that is told to the driver, at most five times a second."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._amount = 0
        self._rates: dict[str, float] = {}
        self._told = 0.0

    def total(self, amount: int, unit: str) -> None:
        """See Progress."""
        self.flush()
        self._tell(Total(amount, unit))

    def advance(self, amount: int = 1, **rates: float) -> None:
        """See Progress."""
        self._amount += amount
        self._rates.update(rates)
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self.flush()

    def note(self, message: str) -> None:
        """See Progress."""
        self._tell(Noted(message))

    def flush(self) -> None:
        """Tell what was not told yet."""
        if self._amount or self._rates:
            self._tell(Advanced(self._amount, self._rates))
        self._amount, self._rates, self._told = 0, {}, time.monotonic()


def carry_out(
    order: Order,
    take: Take,
    tell: Tell,
    stop: Callable[[], bool],
    shared: dict[str, Any],
    settle: Callable[[Order], Order] = lambda order: order,
    share: Callable[[], Share] = Share,
) -> None:
    """Carry out an order to the end that is told: Done, Refused or Broke. shared: what is kept between orders. settle: see
    `worker.main`."""
    progress = ToldProgress(tell)
    try:
        order = settle(order)
        ctx = context_of(order, progress, stop, shared)
        ctx.share = share
        run_order(order, ctx, take, tell)
        progress.flush()
        tell(Limited(dict(ctx.limits)))
        tell(Done())
    except Stopped:
        tell(Done())
    except UserError as error:
        tell(Refused(error))
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", order.spec.name)
        if (disk := storage_error(error, order.root)) is not None:
            tell(Refused(disk))
        else:
            tell(Broke(f"{type(error).__name__}: {error}", traceback.format_exc()))


def run_order(order: Order, ctx: Context, take: Take, tell: Tell) -> None:
    """Compute the order's parts and offer each. Raises what the stage raises."""
    stage = stage_of(order.spec)
    if isinstance(stage, ShardStage):
        _run_shards(stage, order, ctx, take, tell)
    else:
        _run_whole(stage, order, ctx, tell)


def stage_of(spec: StageSpec) -> ShardStage | TableStage:
    """The stage, ready to run."""
    module, name = spec.entry.split(":")
    stage: ShardStage | TableStage = getattr(importlib.import_module(module), name)()
    return stage


def context_of(order: Order, progress: Progress, stop: Callable[[], bool], shared: dict[str, Any]) -> Context:
    """What the stage is given."""
    folder = None
    if order.spec.kind == "artifact":
        folder = RunDir(order.root).artifacts(order.spec, order.round)
        files.make_folder(folder)
    limits: dict[str, int] = shared.setdefault(_LIMITS, {})  # one for the worker's life, like the engine that holds it
    limits.update(order.limits)
    files.make_folder(order.scratch)
    rundir = RunDir(order.root)
    return Context(
        config=order.config,
        round=order.round,
        inputs={table: [order.root / record.path for record in records] for table, records in order.inputs.items()},
        models=order.models,
        progress=progress,
        folder=folder,
        scratch=order.scratch,
        shared=shared,
        stop=stop,
        limits=limits,
        unfinished=lambda index: rundir.unfinished(order.spec, order.round, order.fingerprint, index),
        machines=order.machines,
        left=order.left,
    )


def _run_shards(stage: ShardStage, order: Order, ctx: Context, take: Take, tell: Tell) -> None:
    source = order.inputs[order.spec.reads[0].rstrip("?")]
    ends = list(accumulate(record.rows or 0 for record in source))
    begun = time.monotonic()

    def shards() -> Iterator[Shard]:
        while (shard := take()) is not None and not ctx.stop():
            yield Shard(shard.index, read_range(order.root, source, ends, shard, order.visible_seconds))

    def prepare(part: Part, seconds: float, limits: dict[str, int]) -> None:
        if missing := set(order.spec.writes) - set(part.tables):
            raise ValueError(f"{order.spec.name}: part {part.index} lacks the tables {sorted(missing)}")
        builder = _builder(order, part.index)
        for table, data in part.tables.items():
            builder.write(table, data)
        prepared = builder.finish(part.tallies, part.drops, part.stats, seconds)
        tell(Limited(limits))
        tell(Offered(prepared))

    with Writer(prepare) as writer:
        for part in stage.run(ctx, shards()):
            now = time.monotonic()
            writer.put(part, now - begun + part.seconds_before, dict(ctx.limits))
            begun = now  # waiting for the part before to be written is time of the next one


def _run_whole(stage: TableStage, order: Order, ctx: Context, tell: Tell) -> None:
    """TableStage or ArtifactStage: everything it writes is one part."""
    begun = time.monotonic()
    builder = _builder(order, 0)
    account: Account | None = None
    for item in stage.run(ctx):
        if isinstance(item, Account):
            account = item
            break
        builder.write(item.table, item.data)
    if account is None:
        raise ValueError(f"{order.spec.name} ended without an account")
    refused = refused_path(RunDir(order.root), order.spec, order.round)
    files.remove([refused])
    if account.refusal is not None:
        keep_refused(refused, account.drops, order.scratch)
        raise account.refusal
    if missing := set(order.spec.writes) - builder.tables:
        raise ValueError(f"{order.spec.name} wrote no {sorted(missing)}, not even an empty table")
    builder.add_artifacts(account.artifacts, ctx.folder)
    seconds = time.monotonic() - begun
    tell(Offered(builder.finish(account.tallies, account.drops, account.stats, seconds)))


def _builder(order: Order, index: int) -> PartBuilder:
    return PartBuilder(RunDir(order.root), order.spec, order.round, index, order.fingerprint, order.scratch)


def read_range(root: Path, records: list[FileRecord], ends: list[int], wanted: ShardRange, seconds: float = 0.0) -> Any:
    """Rows [start, stop) of a table given as its files in order and where each ends; reads only the files they lie in, and waits so
    long to see them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pieces = []
    for n in range(bisect_right(ends, wanted.start), bisect_left(ends, wanted.stop) + 1):
        offset = ends[n] - (records[n].rows or 0)
        start, stop = max(wanted.start - offset, 0), min(wanted.stop, ends[n]) - offset
        if start < stop:
            files.await_whole(root, [records[n]], seconds, thorough=False)
            pieces.append(pq.read_table(root / records[n].path, partitioning=None).slice(start, stop - start))
    table = pa.concat_tables(pieces)
    if table.num_rows != wanted.stop - wanted.start:
        raise ValueError(f"shard {wanted.index}: {table.num_rows} rows instead of {wanted.stop - wanted.start}")
    return table
