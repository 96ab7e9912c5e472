"""The process of a ProcessEngine: loads the engine, answers streams of requests, says why it cannot go on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.engines.base import Load, Request, StreamingEngine, storable_line
from stages.engines.last_words import Log

END = "end of stream"
_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "no available memory",
    "larger than the available kv cache",
)
_BUSY = ("free memory on device",)
"""The device's memory is taken, by others or by an engine that ends: time helps, fewer sequences do not."""
_SILENT = ("workerproc initialization failed",)
"""Of tensor parallel, whatever it was: the reason stays in the log."""
_STARTS, _STARTS_OF_THE_SAME = 5, 2
"""Starts in a row that may fail: 256 sequences are then down to 16. What the engine says is wrong is most often still so the second time."""


class EngineDied(Exception):
    """The engine's process ended, or said that it cannot go on. memory: for want of memory that fewer sequences take less of. busy: for want
    of memory that others have. starts: so many in a row may fail."""

    def __init__(self, why: str, memory: bool, busy: bool = False, starts: int = _STARTS) -> None:
        super().__init__(why, memory, busy, starts)
        self.why, self.memory, self.busy, self.starts = why, memory, busy, starts


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
    log = Log()
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
        death = _death(error, storable_line(error), log)
        connection.send(death if death.memory or death.busy else error)
    except Exception as error:
        death = _death(error, f"{type(error).__name__}: {storable_line(error)}", log)
        logging.getLogger(__name__).exception("the engine failed")
        connection.send(death)


def _read(connection: Connection, messages: queue.SimpleQueue[Any]) -> None:
    """Take messages in at once, so that neither side ever waits for the other to read."""
    try:
        while (message := connection.recv()) is not None:
            messages.put(message)
    except (EOFError, OSError):
        pass
    messages.put(None)


def _death(error: BaseException, why: str, log: Log) -> EngineDied:
    """What an error that ends the engine means. Of one without a reason, the log has it."""
    if _says(error, _SILENT) and (found := log.exceptions()):
        why = next((line for line in found if _of(line, _MEMORY + _BUSY)), found[-1])
        busy, memory = _of(why, _BUSY), _of(why, _MEMORY)
    else:
        busy, memory = _says(error, _BUSY), isinstance(error, MemoryError) or _says(error, _MEMORY)
    return EngineDied(why, memory, busy, _STARTS if memory or busy else _STARTS_OF_THE_SAME)


def _says(error: BaseException | None, texts: Sequence[str]) -> bool:
    """Whether this error, or what caused it, says one of them."""
    while error is not None:
        if _of(str(error), texts):
            return True
        error = error.__cause__
    return False


def _of(line: str, texts: Sequence[str]) -> bool:
    return any(text in line.lower() for text in texts)
