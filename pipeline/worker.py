"""A worker process: takes orders over its pipe and carries them out (`pipeline.runner`).

It keeps loaded engines between orders, so neighbouring stages with the same model load it once.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.messages import Assigned, Leave, Order, ToDriver, Want
from pipeline.runner import carry_out
from schemas.manifests import ShardRange
from schemas.secrets import without_secrets
from stages.contract import Share
from stages.text.visible import visible


class Line:
    """The worker's end of the pipe: messages of the writer's thread and of the stage's do not mix."""

    def __init__(self, connection: Connection) -> None:
        self.share = Share()
        self._connection = connection
        self._lock = threading.Lock()

    def tell(self, message: ToDriver) -> None:
        """Say something to the driver."""
        with self._lock:
            self._connection.send(message)

    def take(self) -> ShardRange | None:
        """Ask for a shard; None if there is none left."""
        self.tell(Want())
        assigned: Assigned = self._connection.recv()
        self.share = assigned.share
        return assigned.shard

    def order(self) -> Order | Leave:
        """The next order, waited for."""
        message: Order | Leave = self._connection.recv()
        if isinstance(message, Order):
            self.share = message.share
        return message


def main(connection: Connection, log: Path, stop: Any, settle: Callable[[Order], Order] = lambda order: order) -> None:
    """Entry point of the worker process. stop: a shared byte, not 0 when the run was asked to stop. settle: makes an order one that can
    be carried out here."""
    log_to(log)
    _lock_bars()
    shared: dict[str, Any] = {}
    line = Line(connection)
    try:
        while isinstance(order := line.order(), Order):
            carry_out(order, line.take, line.tell, lambda: bool(stop.value), shared, settle, lambda: line.share)
    except (EOFError, BrokenPipeError):
        return
    finally:
        for resource in shared.values():
            if hasattr(resource, "close"):
                resource.close()


def _lock_bars() -> None:
    """tqdm's own lock is a semaphore of the system, which a worker that is killed leaves behind, with a warning at the very end."""
    with suppress(ImportError):  # comes with transformers, which the core has not
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


def log_to(log: Path) -> None:
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
        return visible(without_secrets(super().format(record)))
