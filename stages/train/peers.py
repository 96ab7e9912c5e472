"""How long processes that train together wait for each other: a silent one ends them all within `execution.peer_minutes`.

In a collective the backend's timeout is the limit. While the first process computes something for all (references, the task vector), which
may take hours, it beats in the group's store; the others wait as long as it does.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

import torch.distributed as dist

from schemas.config import RunConfig
from schemas.errors import UserError

T = TypeVar("T")
_BEAT_SECONDS = 1.0
_STORE_SECONDS = 30.0
_TIMEOUTS = ("timed out", "timeout")
_turns = count()
"""Times that all waited for the first, which all processes count alike."""


def peer_limit(config: RunConfig) -> timedelta:
    """How long a process may be silent."""
    return timedelta(minutes=config.execution.peer_minutes)


@contextmanager
def beating() -> Iterator[None]:
    """The first process is heard while it computes."""
    key, done = f"congrad/beat/{next(_turns)}", threading.Event()
    store = _own_store()
    store.add(key, 1)

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            store.add(key, 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_STORE_SECONDS)  # a store that went away answers nobody: the next barrier says so
        store.set(f"{key}/done", "1")


def wait_for_the_first(limit: timedelta) -> None:
    """Until it has computed. Raises UserError when it is silent for longer."""
    key = f"congrad/beat/{next(_turns)}"
    store, beats, heard = _own_store(), -1, time.monotonic()
    while not store.check([f"{key}/done"]):
        now = store.add(key, 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - heard > limit.total_seconds():
            raise _silent(limit, "process 0")
        time.sleep(min(_BEAT_SECONDS, limit.total_seconds()) / 4)


def within(limit: timedelta, who: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises UserError when it takes longer; it is left behind then."""
    pool = ThreadPool(1)  # its thread does not hold up the end of this process
    pending = pool.apply_async(call)
    pool.close()
    try:
        return pending.get(limit.total_seconds())
    except multiprocessing.TimeoutError:
        raise _silent(limit, who) from None


def launched_store(limit: timedelta) -> Any:
    """The store at which those meet that a launcher started (by torchrun's variables), once all are there. Raises UserError when they are not
    within the limit, RuntimeError where there is none."""
    store, _, _ = within(limit, "the other machines", lambda: next(dist.rendezvous("env://", timeout=limit)))
    return store


@contextmanager
def silence_named(limit: timedelta) -> Iterator[None]:
    """UserError instead of what the backend raises when a collective of the processes waited too long."""
    try:
        yield
    except RuntimeError as error:  # also torch's DistBackendError
        if any(word in str(error).lower() for word in _TIMEOUTS):
            raise _silent(limit, "one of them") from error
        raise


def _silent(limit: timedelta, which: str) -> UserError:
    return UserError(
        f"The processes that train together waited {limit.total_seconds() / 60:g} minutes for {which}, which said nothing",
        where="execution.peer_minutes",
        fix="Look at the worker's log and at the machine; a longer limit waits longer. The same command continues from the last"
        " checkpoint.",
    )


def _own_store() -> dist.TCPStore:
    """A connection to the group's store of this thread's own."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
