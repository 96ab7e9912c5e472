"""Preparing parts in the background: the stage computes the next shard while the last part is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec

Given = ParamSpec("Given")


class Writer(Generic[Given]):
    """Calls `commit` in one thread, one part after another in the order they are put.

    At most one part is being written and none waits: `put` waits for the part before. An error of `commit` is raised by
    the next `put`, or when the context ends; nothing is committed after it. When the stage fails, the part being
    written is finished first; a kill leaves it without its JSON, as if it had never been computed (`pipeline.commit`).
    """

    def __init__(self, commit: Callable[Given, None]) -> None:
        self._commit = commit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._last: Future[None] | None = None

    def put(self, *args: Given.args, **kwargs: Given.kwargs) -> None:
        """Commit a part. Returns as soon as the part before is committed; raises its error."""
        self._wait()
        self._last = self._pool.submit(self._commit, *args, **kwargs)

    def __enter__(self) -> Writer[Given]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self._wait()
        elif self._last is not None and self._last.exception() is not None:
            logging.getLogger(__name__).error("the last part was not committed", exc_info=self._last.exception())

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
