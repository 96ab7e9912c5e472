"""Batches of requests for engines that run a model in this process: filled in order, halved when memory runs out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context
from stages.engines.base import Completion, Engine, Request, refused_by_length
from stages.models.device import free_memory, is_out_of_memory

_BATCH = "engine.batch_size"


class BatchEngine(Engine):
    """Batches are filled in order of arrival and never mix groups (shards) or kinds of requests, so a shard's result is a function
    of that shard.

    A batch that does not fit in memory is halved, and the smaller size kept (ctx: for the rest of the run); in
    reference mode, where the batch decides the last bits, UserError is raised instead. A request that does not fit
    alone gives a completion with finish_reason error.
    """

    def __init__(self, config: RunConfig, ctx: Context | None) -> None:
        self._ctx, self._fixed = ctx, config.execution.deterministic
        self._batch_size = ctx.limited(_BATCH, config.engine.batch_size) if ctx else config.engine.batch_size

    @abstractmethod
    def run_batch(self, batch: list[Request]) -> Iterable[Completion]:
        """The completions of requests that fit the context and are alike."""

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """See `Engine.stream`. A batch ends early where the group or the kind of request changes."""
        for _, alike in groupby(requests, key=lambda request: (request.group, bool(request.score_tokens))):
            while batch := list(islice(alike, self._batch_size)):
                fitting = []
                for request in batch:
                    problem = refused_by_length(request, self.context_length)
                    if problem is None:
                        fitting.append(request)
                    else:
                        yield problem
                if fitting:
                    yield from self._fit(fitting)

    def _fit(self, batch: list[Request]) -> list[Completion]:
        """Completions of a batch, in halves if it does not fit in memory."""
        try:
            return list(self.run_batch(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        if len(batch) == 1:
            detail = f"{len(batch[0].prompt_ids)} prompt tokens and their answer do not fit in memory, even alone"
            return [Completion(batch[0].id, "", [], 0, "error", error=detail)]
        if self._fixed:
            raise UserError(
                f"A batch of {len(batch)} requests does not fit in memory",
                where=_BATCH,
                fix="Set a smaller one: in reference mode the batches decide the last bits, so they are never changed.",
            )
        half = (len(batch) + 1) // 2
        if half < self._batch_size:
            self._batch_size = half
            if self._ctx:
                self._ctx.limit(_BATCH, half, f"{len(batch)} requests in a batch do not fit in memory")
        return [*self._fit(batch[:half]), *self._fit(batch[half:])]
