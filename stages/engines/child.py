"""The process of a ProcessEngine: loads the engine, answers streams of requests, says why it cannot go on."""

from __future__ import annotations

import logging
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.engines.base import Load, Request, StreamingEngine, storable_line

END = "end of stream"
_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "no available memory",
    "larger than the available kv cache",
    "workerproc initialization failed",  # tensor parallel: the reason stays in the log, and is nearly always memory
)


class EngineDied(Exception):
    """The engine's process ended, or said that it cannot go on. memory: for want of memory."""

    def __init__(self, why: str, memory: bool) -> None:
        super().__init__(why, memory)
        self.why, self.memory = why, memory


class _Inbox:
    """The child's side of a stream: None when no request is at hand but some are running, so that they go on."""

    def __init__(self, messages: queue.SimpleQueue[Any]) -> None:
        self._messages, self._running = messages, 0

    def __iter__(self) -> _Inbox:
        return self

    def __next__(self) -> Request | None:
        try:
            message = self._messages.get(block=self._running == 0)
        except queue.Empty:
            return None
        if message == END:
            raise StopIteration
        if message is None:
            raise SystemExit(0)
        self._running += 1
        return message

    def answered(self) -> None:
        self._running -= 1


def main(connection: Connection, load: Load, model: ModelRef, config: RunConfig) -> None:
    """Entry point of the engine's process."""
    try:
        engine = load(model, config, None)
        assert isinstance(engine, StreamingEngine), "an engine with own_process takes None among its requests"
        connection.send((engine.context_length, 3 * config.engine.max_num_seqs, engine.labels))
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
        try:
            while True:
                inbox = _Inbox(messages)
                for completion in engine.stream(inbox):
                    inbox.answered()
                    connection.send(completion)
        finally:
            engine.close()
    except (BrokenPipeError, SystemExit):
        return
    except UserError as error:
        connection.send(EngineDied(storable_line(error), True) if _wants_memory(error) else error)
    except Exception as error:
        logging.getLogger(__name__).exception("the engine failed")
        connection.send(EngineDied(f"{type(error).__name__}: {storable_line(error)}", _wants_memory(error)))


def _read(connection: Connection, messages: queue.SimpleQueue[Any]) -> None:
    """Take messages in at once, so that neither side ever waits for the other to read."""
    try:
        while (message := connection.recv()) is not None:
            messages.put(message)
    except (EOFError, OSError):
        pass
    messages.put(None)


def _wants_memory(error: BaseException | None) -> bool:
    """Whether this error, or what caused it, is a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _MEMORY):
            return True
        error = error.__cause__
    return False
