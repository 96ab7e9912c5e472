"""Ray's client in a process of its own, whose methods the driver calls: the driver neither imports Ray nor dies with it.

Ray ends the process that is its client when it misses the cluster's head for too long, or the node it came from, and blocks in calls before. So
whatever becomes of the cluster, the driver has its words: those of the client's guard, or that the client ended.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from pipeline.cluster import AGAIN, ClusterLost
from pipeline.executor_errors import Defect
from pipeline.worker import log_to
from schemas.errors import UserError
from stages.children import Child, ChildDied, start_child, wait_for

_ANSWER_SECONDS = 300.0
"""Without an answer and without a sign of life from the guard: the client hangs where not even that runs. Calls have limits of their own, or read
what may be long (the hash of a large part)."""
_CALL_SECONDS = 6 * 3600.0
"""For a call whose guard lives: a disk that no longer answers is not waited for for ever."""
_LEAVE_SECONDS = 10.0
_GUARD_SECONDS = 1.0


class ClientFailed(Defect):
    """Something broke in Ray's client, while the cluster may be well."""


GONE = (ClusterLost, ClientFailed)
"""What every call of a client that ended raises."""


class OnCluster(Protocol):
    """What lives in the client's process."""

    def check_lives(self) -> object:
        """Raise ClusterLost once the cluster no longer answers; asked from a thread of its own."""

    def close(self) -> None:
        """Leave the cluster."""


T = TypeVar("T", bound=OnCluster)
P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", ClusterLost, ClientFailed)


@dataclass(frozen=True)
class _Call:
    method: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: UserError | None = None


@dataclass(frozen=True)
class _Broke:
    """The last word of a client in which something broke that nobody foresaw: what, in a line, and its traceback."""

    what: str
    trace: str


@dataclass(frozen=True)
class _Alive:
    """The guard's, while a call is at work."""


class RayClient(Generic[T]):
    """make(*arguments) is called in the client's process, and its result lives there. Raises the UserError that it raises; ClientFailed for
    anything else."""

    def __init__(self, make: Callable[..., T], arguments: tuple[Any, ...], log: Path) -> None:
        self._log = log
        self._ended: Exception | None = None
        """Why it is no longer there: raised by every later call."""
        self._child: Child = start_child(_serve, (log, make, arguments), "congrad-ray", leads=True)
        try:
            self._answered()
        except BaseException:
            self.close()
            raise

    def call(self, method: Callable[Concatenate[T, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """The method of what lives there, with arguments and result sent. Raises its UserError; ClusterLost when the client is gone,
        ClientFailed when something broke in it."""
        assert not named, "arguments are sent by their place"
        if self._ended:
            raise self._ended
        with suppress(ChildDied):  # it may have said why
            self._child.send(_Call(method, arguments))
        value: R = self._answered()
        return value

    def close(self) -> None:
        """End the client, and with it what it started on the cluster."""
        if not self._ended:
            self._ended = self._lost("it was left")
            with suppress(ChildDied):
                self._child.send(None)
            self._child.end(_LEAVE_SECONDS)

    def _answered(self) -> Any:
        begun = time.monotonic()
        try:
            word = self._heard()
            while isinstance(word, _Alive):
                if time.monotonic() - begun > _CALL_SECONDS:
                    raise ChildDied(f"no answer in {_CALL_SECONDS / 3600:.0f} h")
                word = self._heard()
        except ChildDied as death:
            raise self._kill(self._lost(death.cause)) from None
        except BaseException:  # a signal, perhaps in the midst of a word: what follows could not be understood
            self._kill(self._lost("it was left"))
            raise
        if isinstance(word, _Broke):
            raise self._kill(ClientFailed(f"Ray's client broke: {word.what}", word.trace, self._where()))
        if isinstance(word.error, ClusterLost):
            self._kill(word.error)
        if word.error is not None:
            raise word.error
        return word.value

    def _heard(self) -> _Answer | _Alive | _Broke:
        deadline = time.monotonic() + _ANSWER_SECONDS
        wait_for([self._child], _ANSWER_SECONDS)
        if time.monotonic() >= deadline:
            raise ChildDied(f"silence of {_ANSWER_SECONDS:.0f} s")
        word: _Answer | _Alive | _Broke = self._child.receive()
        return word

    def _kill(self, why: E) -> E:
        self._ended = why
        self._child.kill()
        return why

    def _lost(self, cause: str) -> ClusterLost:
        return ClusterLost(
            f"The Ray cluster no longer answers (its client ended: {cause})",
            where="execution.ray_address" if self._log == Path(os.devnull) else str(self._log),
            fix=AGAIN,
        )

    def _where(self) -> str:
        return "it wrote no log" if self._log == Path(os.devnull) else f"log: {self._log}"


class _Line:
    """The client's end of the pipe: words of the guard's thread and of calls do not mix."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._speaking = connection, threading.Lock()
        self.at_work = threading.Event()

    def tell(self, word: _Answer | _Alive | _Broke) -> None:
        """Say something to the driver."""
        with self._speaking:
            self._connection.send(word)

    def next_call(self) -> _Call | None:
        """Waited for; None to leave."""
        call: _Call | None = self._connection.recv()
        return call

    def break_off(self, error: Exception) -> None:
        """The last word of a client in which this was raised."""
        first = next(iter(str(error).strip().splitlines()), "")
        trace = "".join(traceback.format_exception(error))
        with suppress(OSError):  # the driver is gone too
            self.tell(_Broke(f"{type(error).__name__}: {first}".removesuffix(": "), trace))


def _serve(connection: Connection, log: Path, make: Callable[..., OnCluster], arguments: tuple[Any, ...]) -> None:
    """The client's process: one call after the other. What Ray prints goes to the log."""
    log_to(log)
    line = _Line(connection)
    try:
        _carry_out_calls(line, make, arguments)
    except Exception as error:  # Ray's are many, and the driver must have words for each
        logging.getLogger(__name__).exception("Ray's client ends")
        line.break_off(error)


def _carry_out_calls(line: _Line, make: Callable[..., OnCluster], arguments: tuple[Any, ...]) -> None:
    try:
        target = make(*arguments)
    except UserError as error:
        line.tell(_Answer(error=error))
        return
    line.tell(_Answer())
    threading.Thread(target=_guard, args=(target, line), name="guard", daemon=True).start()
    with suppress(EOFError):
        while (call := line.next_call()) is not None:
            line.at_work.set()
            try:
                answer = _Answer(call.method(target, *call.arguments))
            except UserError as error:
                answer = _Answer(error=error)
            line.at_work.clear()
            line.tell(answer)
    target.close()


def _guard(target: OnCluster, line: _Line) -> None:
    """Signs of life while a call is at work, and the last words of a client whose cluster is gone, whatever it waits in."""
    while True:
        time.sleep(_GUARD_SECONDS)
        try:
            target.check_lives()
        except ClusterLost as lost:
            with suppress(OSError):
                line.tell(_Answer(error=lost))
            os._exit(1)
        except Exception as error:  # without a guard the driver would wait long for a client that hangs
            logging.getLogger(__name__).exception("Ray's client ends")
            line.break_off(error)
            os._exit(1)
        if line.at_work.is_set():
            with suppress(OSError):  # the driver is gone: the client's own loop hears of it
                line.tell(_Alive())
