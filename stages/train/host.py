"""A machine that takes part in a training which another one leads: it waits to be told, starts its processes, relays their words.

The wire is Python's own `multiprocessing.connection`: whoever connects must know the key. torch's store and collectives have no keys, so
that machines that train together need a network of their own, as with torchrun.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from schemas.errors import UserError
from stages.contract import Machine
from stages.train.peers import within
from stages.train.processes import process_count
from stages.train.seat import Broke, Group, Lost, Refused, Seat, Word, Work, interface_of

_HEAR_SECONDS = 1.0


@dataclass(frozen=True)
class Invitation:
    """To a host: the seats from rank `first` on, `processes` of `count`; port: of the group's store."""

    work: Work
    first: int
    processes: int
    count: int
    port: int
    cuda: bool


@dataclass(frozen=True)
class StopAsked:
    """To a host: its processes are to stop at their next safe point."""


@dataclass(frozen=True)
class Said:
    """To the leader: a process's word. age: seconds since a failure, since machines' clocks differ."""

    rank: int
    word: Word
    age: float = 0.0


def serve(listener: Listener, settle: Callable[[Work], Work]) -> None:
    """Take part in one training after another, until the listener is closed. settle: makes work one that can be done on this machine."""
    while True:
        try:
            connection = listener.accept()
        except (AuthenticationError, EOFError, ConnectionError):
            continue  # not one of ours
        except OSError:
            return
        with connection, suppress(EOFError, ConnectionError):  # the leader is gone
            _take_part(connection, settle)


def _take_part(connection: Connection, settle: Callable[[Work], Work]) -> None:
    invitation: Invitation = connection.recv()
    try:
        group = Group(settle(invitation.work), _seats(invitation, connection))
    except UserError as error:
        connection.send(Said(invitation.first, Refused(error)))
        return
    try:
        while True:
            ready = wait([connection, *group.waited], _HEAR_SECONDS)
            if connection in ready and isinstance(connection.recv(), StopAsked):
                group.stop()
            for rank, word in group.heard():
                age = time.monotonic() - word.when if isinstance(word, Broke) else 0.0
                connection.send(Said(rank, word, age))
    finally:
        group.close()


def _seats(invitation: Invitation, connection: Connection) -> list[Seat]:
    """This machine's. Raises UserError where it would have another number of them."""
    processes, here = invitation.processes, socket.gethostname()
    if (own := process_count(invitation.work.config)) != processes:
        raise UserError(
            f"Machine {here} would train with {own} processes, the first machine with {processes}",
            where="train.processes",
            fix="All machines take part with the same number: set it to what the smallest holds.",
        )
    (own_address, _), (leader, _) = _ends(connection)
    interface = interface_of(own_address)
    return [
        Seat(
            invitation.first + local,
            invitation.count,
            local,
            processes,
            leader,
            invitation.port,
            interface,
            invitation.cuda,
        )
        for local in range(processes)
    ]


class Far:
    """The leader's end of a host: processes of a training on another machine. Raises UserError for one that does not answer."""

    def __init__(self, machine: Machine, limit: timedelta) -> None:
        self.name, self.interface = machine.name, ""
        self._ranks = range(0)
        self._gone = False
        host, port = machine.address
        try:
            self._connection: Any = within(
                limit, f"machine {self.name}", lambda: Client((host, port), authkey=machine.key)
            )
        except (OSError, EOFError, AuthenticationError) as error:
            raise UserError(
                f"Machine {self.name} does not answer at {host}:{port}: {error or type(error).__name__}",
                where="train.nodes",
                fix="Machines that train together must reach each other on all ports; the same command continues from the last checkpoint.",
            ) from error
        self.interface = interface_of(_ends(self._connection)[0][0])

    def start(self, invitation: Invitation) -> None:
        """Have its processes started."""
        self._ranks = range(invitation.first, invitation.first + invitation.processes)
        self._tell(invitation)

    @property
    def waited(self) -> list[Any]:
        """See `Group`."""
        return [] if self._gone else [self._connection]

    def heard(self) -> Iterator[tuple[int, Word]]:
        """See `Group`. All are lost with their machine."""
        try:
            while not self._gone and self._connection.poll():
                said: Said = self._connection.recv()
                word = said.word
                yield said.rank, replace(word, when=time.monotonic() - said.age) if isinstance(word, Broke) else word
        except (EOFError, OSError):
            self._gone = True
            for rank in self._ranks:
                yield rank, Lost(f"the loss of its machine {self.name}")

    def stop(self) -> None:
        """See `Group`."""
        self._tell(StopAsked())

    def close(self) -> None:
        """See `Group`: its host ends them when we are gone."""
        self._connection.close()

    def _tell(self, message: Any) -> None:
        with suppress(OSError):  # `heard` says that it is gone
            self._connection.send(message)


def _ends(connection: Connection) -> tuple[tuple[str, int], tuple[str, int]]:
    """((own address, port), (the other's)) of a connection."""
    with socket.socket(fileno=socket.dup(connection.fileno())) as end:
        return end.getsockname()[:2], end.getpeername()[:2]
