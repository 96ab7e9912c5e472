"""SIGINT, SIGTERM and SIGHUP (a closed terminal): the first lets running work reach a safe point, the second stops now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.executor_errors import Interrupted


class StopSignals:
    """Context manager that catches SIGINT, SIGTERM and SIGHUP in the main thread; under nohup SIGHUP stays ignored.

    While work is `deferred`, the first signal is only remembered (the executor looks at `asked`); otherwise, and when
    it is the second, Interrupted is raised where the driver is. The handler prints nothing: it may come in the middle
    of a print. Every file the driver writes is published by rename, so it may be interrupted anywhere.
    """

    def __init__(self) -> None:
        self.asked = 0
        """Number of the signal that asked to stop; 0: none."""
        self._deferring = False

    def __enter__(self) -> StopSignals:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Work that should reach a safe point before it stops."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def raise_if_asked(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.asked:
            raise Interrupted(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = bool(self.asked), number
        if again or not self._deferring:
            raise Interrupted(number)
