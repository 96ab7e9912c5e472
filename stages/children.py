"""Child processes: started with a pipe to them, listened to, known when they die and of what, ended with what they started.

The one supervisor of workers, of engines in a process of their own and of processes that train together.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1
_JOIN_SECONDS = 20.0


class ChildDied(Exception):
    """A child process ended. cause: in words. killed: by SIGKILL, most often for want of memory."""

    def __init__(self, cause: str, killed: bool = False) -> None:
        super().__init__(cause, killed)
        self.cause, self.killed = cause, killed


class Child:
    """A child process and our end of the pipe to it."""

    def __init__(self, process: BaseProcess, connection: Connection, leads: bool) -> None:
        self._process, self._connection, self._leads = process, connection, leads

    @property
    def waited(self) -> list[Any]:
        """What `multiprocessing.connection.wait` finds ready when it says something or ends."""
        return [self._connection, self._process.sentinel]

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send a message. Raises ChildDied."""
        try:
            self._connection.send(message)
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """Its next message, waited for. Raises ChildDied when it ends without one. One that hangs is the watchdog's: the driver ends
        the worker that waits here, and with it the child (execution.watchdog_minutes)."""
        wait(self.waited)
        return self._next()

    def messages(self) -> Iterator[Any]:
        """What it has said and was not read yet. Raises ChildDied after the last word of one that ended."""
        while self._says():
            yield self._next()
        if not self._process.is_alive():
            while self._says():  # said between the look at the pipe and the one at the process
                yield self._next()
            raise self._death()

    def end(self, seconds: float) -> None:
        """Let one that was told to leave do so; kill it when it has not after so many seconds."""
        self._process.join(seconds)
        self.kill()

    def kill(self) -> None:
        """End it at once, and what it started where it leads a process group of its own. It may have ended already."""
        if self._leads and self._process.pid is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._process.kill()
        else:
            self._process.kill()
        self._process.join(_JOIN_SECONDS)  # a process that hangs in the kernel outlives even SIGKILL for a while
        self._connection.close()

    def _says(self) -> bool:
        try:
            return self._connection.poll()
        except OSError:
            return True  # `_next` says what it is

    def _next(self) -> Any:
        try:
            if not self._connection.poll():
                raise EOFError
            return self._connection.recv()
        except (EOFError, OSError):  # closed, perhaps in the middle of a message
            raise self._death() from None

    def _death(self) -> ChildDied:
        self._process.join(_JOIN_SECONDS)
        code = self._process.exitcode
        if code is None:
            return ChildDied("closing its pipe")
        if code >= 0:
            return ChildDied(f"exit code {code}")
        memory = ", most often the system was out of memory" if code == -signal.SIGKILL else ""
        return ChildDied(f"signal {-code} ({signal.Signals(-code).name}){memory}", code == -signal.SIGKILL)


def start_child(
    entry: Callable[..., None],
    arguments: Sequence[Any],
    name: str,
    *,
    method: str = "spawn",
    environment: Mapping[str, str] | None = None,
    leads: bool = False,
) -> Child:
    """A process that calls `entry(connection, *arguments)` and dies with this thread.

    leads: it leads a process group of its own, so that it is ended with all it started, and Ctrl-C reaches us alone.
    environment: set before it starts, since native libraries read it when they load.
    """
    context: Any = get_context(method)
    ours, theirs = context.Pipe()
    parent = os.getpid() if method == "spawn" else 0  # another process forks it otherwise
    process = context.Process(target=_enter, args=(parent, leads, entry, theirs, arguments), name=name)
    with _environment(environment or {}), _unknown_main():
        process.start()
    theirs.close()
    return Child(process, ours, leads)


def wait_for(children: Sequence[Child], seconds: float) -> None:
    """Until one of them says something or ends, or so many seconds have passed."""
    wait([each for child in children for each in child.waited], timeout=seconds)


def stop_flag() -> Any:
    """A byte (`.value`, 0 at first) that children may be given, without a lock: one killed while it held an Event's lock would
    hang the others."""
    return get_context("spawn").RawValue("b", 0)


def _enter(
    parent: int, leads: bool, entry: Callable[..., None], connection: Connection, arguments: Sequence[Any]
) -> None:
    if leads:
        os.setsid()
    # Schedulers signal every process of a job: who started us decides. A handler, since SIG_IGN would be inherited by
    # what we start.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)
    _keep_locks_here()
    entry(connection, *arguments)


def _keep_locks_here() -> None:
    """tqdm's lock is a semaphore that processes share: of a child that is killed, Python's resource tracker says in the terminal that it
    leaked. Bars of one process need a thread's lock."""
    if find_spec("tqdm") is not None:
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


@contextmanager
def _unknown_main() -> Iterator[None]:
    """A spawned process runs its parent's script first, for what may be defined there: one that starts a run would start it again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
