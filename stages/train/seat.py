"""One of the processes of a training: where it sits, what it says, and all of them on this machine (`Group`)."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from schemas.config import RunConfig
from schemas.errors import UserError, first_line
from stages.children import Child, ChildDied, start_child, stop_flag
from stages.contract import Context, ModelRef, Silent, Stopped
from stages.models.device import is_out_of_memory
from stages.train.peers import peer_limit, silence_named

LOOPBACK = "127.0.0.1"
_START = timedelta(minutes=10)
"""For all processes to have been started, however short `execution.peer_minutes` is: machines may first have to hash their models."""


@dataclass(frozen=True)
class Work:
    """What all processes of a training are given: a job and what its context holds."""

    job: Callable[[Context], Any]
    config: RunConfig
    round: int
    inputs: Mapping[str, list[Path]]
    models: Mapping[str, ModelRef]
    folder: Path | None
    limits: dict[str, int]

    @classmethod
    def of(cls, job: Callable[[Context], Any], ctx: Context) -> Self:
        """`job` with the stage's context."""
        return cls(job, ctx.config, ctx.round, ctx.inputs, ctx.models, ctx.folder, ctx.limits)


@dataclass(frozen=True)
class Seat:
    """rank of `count` over all machines; local: among the `locals` of its own. leader: where the group's store is, as this machine reaches it.
    interface: the one by which machines reach each other; empty: whatever gloo and NCCL find."""

    rank: int
    count: int
    local: int
    locals: int
    leader: str
    port: int
    interface: str
    cuda: bool


@dataclass(frozen=True)
class Progressed:
    """A call of the first process's Progress, to be made on the stage's."""

    method: str
    arguments: tuple[Any, ...]
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """The job returned; stopped: because it was asked to."""

    result: Any = None
    stopped: bool = False


@dataclass(frozen=True)
class Refused:
    """The job raised what the user can correct."""

    error: UserError


@dataclass(frozen=True)
class Broke:
    """The job raised anything else. when: by the clock of the machine that holds this. system: what the system said, if it was that."""

    when: float
    out_of_memory: bool
    what: str
    system: OSError | None = None


@dataclass(frozen=True)
class Lost:
    """The process ended. cause: in words. machine: with its machine."""

    cause: str
    machine: bool = False


Word = Progressed | Ended | Refused | Broke | Lost


class Group:
    """The processes of a training on this machine. They share its process group and log, so that whoever ends the worker ends them too."""

    def __init__(self, work: Work, seats: Sequence[Seat]) -> None:
        # A CUDA process cannot be forked; elsewhere one import of torch and TRL serves all.
        method = "spawn" if seats[0].cuda else "forkserver"
        if method == "forkserver":
            set_forkserver_preload([work.job.__module__])
        self._stop = stop_flag()
        self._children: dict[int, Child] = {}
        self._alive: set[int] = set()
        try:
            for seat in seats:
                name, arguments = f"congrad-train-{seat.rank}", (seat, work, self._stop)
                self._children[seat.rank] = start_child(main, arguments, name, method=method)
                self._alive.add(seat.rank)
        except BaseException:
            self.close()
            raise

    @property
    def waited(self) -> list[Any]:
        """What becomes ready when there is something to hear."""
        return [each for rank in self._alive for each in self._children[rank].waited]

    def heard(self) -> Iterator[tuple[int, Word]]:
        """(rank, what it said), since the last call."""
        for rank in sorted(self._alive):
            try:
                for message in self._children[rank].messages():
                    yield rank, message
            except ChildDied as death:
                self._alive.discard(rank)
                yield rank, Lost(death.cause)

    def stop(self) -> None:
        """Ask all to stop at their next safe point."""
        self._stop.value = 1

    def close(self) -> None:
        """End all at once."""
        for child in self._children.values():
            child.kill()


def interface_of(address: str) -> str:
    """The name of this machine's network interface that has the address; empty if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return ""


def main(connection: Connection, seat: Seat, work: Work, stop: Any) -> None:
    """Entry point of a process."""
    progress = _Told(connection) if seat.rank == 0 else Silent()
    ctx = Context(
        work.config,
        work.round,
        work.inputs,
        work.models,
        progress,
        work.folder,
        stop=lambda: bool(stop.value),
        limits=work.limits,
    )
    try:
        limit = peer_limit(ctx.config)
        with silence_named(limit):
            _join(seat, limit)
            result = work.job(ctx)
    except Stopped:
        connection.send(Ended(stopped=True))
    except UserError as error:
        connection.send(Refused(error))
        os._exit(1)  # the group's threads may wait for the others for ever
    except Exception as error:
        when = time.monotonic()
        logging.getLogger(__name__).exception("process %d", seat.rank)
        what = first_line(error) if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        connection.send(Broke(when, is_out_of_memory(error), what, _of_the_system(error)))
        os._exit(1)
    else:
        connection.send(Ended(result if seat.rank == 0 else None))
    dist.destroy_process_group()


def _of_the_system(error: Exception) -> OSError | None:
    """What the system said, without what a library may have added."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    return OSError(error.errno, error.strerror, error.filename)


class _Told:
    """Progress of the first process, told to the stage's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def total(self, amount: int, unit: str) -> None:
        self._connection.send(Progressed("total", (amount, unit)))

    def advance(self, amount: int = 1, **rates: float) -> None:
        self._connection.send(Progressed("advance", (amount,), rates))

    def note(self, message: str) -> None:
        self._connection.send(Progressed("note", (message,)))


def _join(seat: Seat, limit: timedelta) -> None:
    """Join the group: NCCL between GPUs, gloo for what is on the CPU."""
    os.environ.update(
        {
            "RANK": str(seat.rank),
            "LOCAL_RANK": str(seat.local),
            "WORLD_SIZE": str(seat.count),
            "LOCAL_WORLD_SIZE": str(seat.locals),
            "MASTER_ADDR": seat.leader,
            "MASTER_PORT": str(seat.port),
        }
    )
    if sys.platform == "linux" and seat.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", seat.interface)  # a host's name may not resolve, or to 127.0.1.1
        if seat.count > seat.locals:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", seat.interface)
    if seat.cuda:
        torch.cuda.set_device(seat.local)
    store = dist.TCPStore(seat.leader, seat.port, is_master=False, timeout=max(limit, _START))
    store.set(f"here/{seat.rank}", "")
    store.wait([f"here/{rank}" for rank in range(seat.count)], max(limit, _START))
    store.set_timeout(limit)
    backend = "cpu:gloo,cuda:nccl" if seat.cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.count, timeout=limit)
