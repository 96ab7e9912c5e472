"""What another machine does for a training: it offers seats to the one that leads (`stages.train.host`)."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from pipeline.probe import versions
from pipeline.settled import settled_work
from pipeline.worker import log_to


@dataclass(frozen=True)
class Listening:
    """To the driver: the port where seats are offered, and what the machine runs."""

    port: int
    versions: dict[str, str]


def new_key() -> bytes:
    """What a machine's listener must be told before it is spoken to."""
    return secrets.token_bytes(32)


def offer_seats(connection: Connection, log: Path, stop: Any, key: bytes) -> None:
    """Entry point of a process on a node of a cluster, until it is ended. The leader passes on that the run was asked to stop: `stop` is
    not looked at."""
    log_to(log)
    listener, serve = offering(key)
    connection.send(Listening(listener.address[1], versions()))
    serve()


def offering(key: bytes) -> tuple[Listener, Callable[[], None]]:
    """(a listener on a free port, what answers those who connect to it, until it is closed)."""
    from stages.train.host import serve  # imports torch

    listener = Listener(("", 0), authkey=key)
    return listener, lambda: serve(listener, settled_work)
