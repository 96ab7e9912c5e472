"""What runs on a node of a Ray cluster: a thin host of today's worker process.

The host is an actor. It starts `pipeline.worker` as a child process and relays messages, so that a worker is the same on every
executor: its environment is set before it starts, a crash in native code does not take Ray down, and vLLM does not see that it is
inside Ray. Nothing here imports Ray.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline import worker
from pipeline.settled import settled_order
from stages.children import Child, ChildDied, start_child, stop_flag, wait_for

_HEAR_SECONDS = 10.0
_START_SECONDS = 60.0
"""For a process to start. One that has not by then is nobody to speak to; the driver misses its words and replaces the node's worker."""


@dataclass(frozen=True)
class Placed:
    """To the driver's end of a member: where it is. gpus: their ids there."""

    node_id: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Died:
    """To the driver's end of a member: its process ended. cause: in words."""

    cause: str


class Host:
    """An actor: one process and the words to and from it. `hear` and `tell` are called from threads of their own. entry(connection, log, stop,
    *arguments) is what it runs."""

    def __init__(
        self,
        log: Path,
        folder: str,
        environment: Mapping[str, str],
        entry: Callable[..., None],
        arguments: tuple[Any, ...] = (),
    ) -> None:
        with suppress(OSError):  # of a node that has no such folder; what needs it says so
            os.chdir(folder)
        self._environment = dict(environment)
        self._words: deque[Any] = deque([_placed()])
        self._spoken = threading.Condition()
        self._child: Child | None = None
        self._ready = threading.Event()
        self._stop = stop_flag()
        self._entry, self._arguments = entry, (log, self._stop, *arguments)
        # The death signal of a parent belongs to the thread that started the child: one that stays.
        threading.Thread(target=self._relay, name="relay", daemon=True).start()

    def hear(self) -> list[Any]:
        """What was said since; waited for, but not for ever."""
        with self._spoken:
            self._spoken.wait_for(lambda: self._words, _HEAR_SECONDS)
            said = list(self._words)
            self._words.clear()
        return said

    def tell(self, message: Any) -> None:
        """Pass a message on. `hear` says that the worker died."""
        self._ready.wait(_START_SECONDS)
        if self._child is not None:
            with suppress(ChildDied):
                self._child.send(message)

    def stop(self) -> None:
        """Ask the worker to stop at its next safe point."""
        self._stop.value = 1

    def quit(self) -> None:
        """End the worker at once with all it started."""
        self._ready.wait(_START_SECONDS)
        if self._child is not None:
            self._child.kill()

    def _relay(self) -> None:
        try:
            child = start_child(
                self._entry, self._arguments, "congrad-worker", environment=self._environment, leads=True
            )
        except OSError as error:
            self._say([Died(f"{error.strerror} when it was started")])
            self._ready.set()
            return
        self._child = child
        self._ready.set()
        while True:
            with suppress(OSError, ValueError):  # `quit` closed the pipe
                wait_for([child], _HEAR_SECONDS)
            try:
                for message in child.messages():
                    self._say([message])
            except ChildDied as death:
                self._say([Died(death.cause)])
                return

    def _say(self, words: list[Any]) -> None:
        with self._spoken:
            self._words.extend(words)
            self._spoken.notify()


def main(connection: Connection, log: Path, stop: Any) -> None:
    """Entry point of a worker process on a node."""
    worker.main(connection, log, stop, settled_order)


def _placed() -> Placed:
    import ray

    context = ray.get_runtime_context()
    return Placed(context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ())))
