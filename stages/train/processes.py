"""Several processes that train together on one machine, one per GPU or, with gloo, on the CPU.

The stage's own process starts them, passes on what the first of them says, tells all to stop, and ends all when one dies or fails.
They share its process group and log, so that whoever ends the worker ends them too.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from schemas.config import RunConfig
from schemas.errors import UserError, first_line
from stages.children import Child, ChildDied, start_child, stop_flag, wait_for
from stages.contract import Context, Silent, Stopped
from stages.models.device import device_of, is_out_of_memory
from stages.train.memory import less_memory
from stages.train.peers import beating, peer_limit, wait_for_the_first

T = TypeVar("T")
Job = Callable[[Context], T]
_COLLECT_SECONDS = 2.0
"""When one process fails the others fail of it: so long causes are collected before the first one is named."""


def process_count(config: RunConfig) -> int:
    """Processes that `train.processes` asks for. Raises UserError when there are fewer GPUs."""
    wanted, device = config.train.processes, device_of(config)
    if device.type != "cuda":
        return wanted or 1
    there = torch.cuda.device_count()
    if wanted > there:
        raise UserError(
            f"train.processes is {wanted} and {there} GPU(s) are visible",
            where="train.processes",
            fix="One process trains on one GPU: lower it, or 0 for all GPUs there are.",
        )
    return wanted or there


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process reports and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any of the processes: the same answer in all of them, which must all ask."""
    if world_size() == 1:
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def from_first(compute: Callable[[], T], config: RunConfig) -> T:
    """What the first process computes, in all of them, which must all ask. Stopped, if it raises that, is raised in all; UserError when
    it is silent for longer than `execution.peer_minutes`."""
    if world_size() == 1:
        return compute()
    box: list[Any] = [None, False]
    if is_first():
        with beating():
            try:
                box[0] = compute()
            except Stopped:
                box[1] = True
    else:
        wait_for_the_first(peer_limit(config))
    dist.broadcast_object_list(box)
    if box[1]:
        raise Stopped
    result: T = box[0]
    return result


@dataclass(frozen=True)
class _Seat:
    rank: int
    count: int
    port: int
    cuda: bool


@dataclass(frozen=True)
class _Progressed:
    """A call of the first process's Progress, to be made on the stage's."""

    method: str
    arguments: tuple[Any, ...]
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ended:
    """The job returned; stopped: because it was asked to."""

    result: Any = None
    stopped: bool = False


@dataclass(frozen=True)
class _Refused:
    """The job raised what the user can correct."""

    error: UserError


@dataclass(frozen=True)
class _Broke:
    """The job raised anything else. when: by the clock that all processes of the machine share."""

    when: float
    out_of_memory: bool
    what: str


@dataclass
class _Member:
    """A process: its last word, and what it died of."""

    child: Child
    said: _Ended | _Refused | _Broke | None = None
    death: ChildDied | None = None

    @property
    def failed(self) -> bool:
        return isinstance(self.said, _Refused | _Broke) or (self.said is None and self.death is not None)

    def hear(self, ctx: Context) -> None:
        """Take in what it has said."""
        if self.death is not None:
            return
        try:
            for message in self.child.messages():
                if isinstance(message, _Progressed):
                    getattr(ctx.progress, message.method)(*message.arguments, **message.rates)
                else:
                    self.said = message
        except ChildDied as death:
            self.death = death


class _Told:
    """Progress of the first process, told to the stage's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def total(self, amount: int, unit: str) -> None:
        self._connection.send(_Progressed("total", (amount, unit)))

    def advance(self, amount: int = 1, **rates: float) -> None:
        self._connection.send(_Progressed("advance", (amount,), rates))

    def note(self, message: str) -> None:
        self._connection.send(_Progressed("note", (message,)))


def run_together(job: Job[T], ctx: Context, processes: int) -> T:
    """`job(ctx)` in so many processes; what it returns in the first.

    Raises what the job raised if that is a UserError or Stopped, RuntimeError for any other failure, and UserError when a
    process died.
    """
    cuda = device_of(ctx.config).type == "cuda"
    # A CUDA process cannot be forked; elsewhere one import of torch and TRL serves all.
    if not cuda:
        set_forkserver_preload([job.__module__])
    stop = stop_flag()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parts = {name: getattr(ctx, name) for name in ("config", "round", "inputs", "models", "folder", "limits")}
    members: list[_Member] = []
    try:
        for rank in range(processes):
            arguments = (_Seat(rank, processes, store.port, cuda), job, parts, stop)
            method = "spawn" if cuda else "forkserver"
            members.append(_Member(start_child(_main, arguments, f"congrad-train-{rank}", method=method)))
        return _attend(members, ctx, stop)
    finally:
        for member in members:
            member.child.kill()


def _attend(members: list[_Member], ctx: Context, stop: Any) -> Any:
    failed_at = 0.0
    while running := [member.child for member in members if member.death is None]:
        if ctx.stop():
            stop.value = 1
        wait_for(running, 0.2)
        for member in members:
            member.hear(ctx)
        if not failed_at and any(member.failed for member in members):
            failed_at = time.monotonic()
        if failed_at and time.monotonic() - failed_at > _COLLECT_SECONDS:
            break
    if any(member.failed for member in members):
        _raise_cause(members)
    ends = [member.said for member in members if isinstance(member.said, _Ended)]
    if any(end.stopped for end in ends):
        raise Stopped
    return ends[0].result


def _raise_cause(members: list[_Member]) -> None:
    """The first cause: what a process refused, else one that died without a word, else the earliest error of the code: the others
    lose their connection to that process."""
    for member in members:
        if isinstance(member.said, _Refused):
            raise member.said.error
    for rank, member in enumerate(members):
        if member.said is None and member.death is not None:
            raise _ended(f"process {rank} of the {len(members)} that train together died by {member.death.cause}")
    broke = [
        (member.said.when, rank, member.said) for rank, member in enumerate(members) if isinstance(member.said, _Broke)
    ]
    _, rank, error = min(broke, key=lambda entry: entry[0])
    if error.out_of_memory:
        raise _ended(f"process {rank} of the {len(members)} that train together ran out of memory: {error.what}")
    raise RuntimeError(f"process {rank} of the {len(members)} that train together: {error.what}")


def _ended(what: str) -> UserError:
    return UserError(
        f"{what}; the others were ended",
        where="train.processes",
        fix=f"The worker's log may say more; a {less_memory('train')}",
    )


def _main(connection: Connection, seat: _Seat, job: Job[Any], parts: dict[str, Any], stop: Any) -> None:
    """Entry point of a process."""
    progress = _Told(connection) if seat.rank == 0 else Silent()
    ctx = Context(**parts, progress=progress, stop=lambda: bool(stop.value))
    try:
        _join(seat, peer_limit(ctx.config))
        result = job(ctx)
    except Stopped:
        connection.send(_Ended(stopped=True))
    except UserError as error:
        connection.send(_Refused(error))
        os._exit(1)  # the group's threads may wait for the others for ever
    except Exception as error:
        when = time.monotonic()
        logging.getLogger(__name__).exception("process %d", seat.rank)
        what = first_line(error) if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        connection.send(_Broke(when, is_out_of_memory(error), what))
        os._exit(1)
    else:
        connection.send(_Ended(result if seat.rank == 0 else None))
    dist.destroy_process_group()


def _join(seat: _Seat, limit: timedelta) -> None:
    """Join the group: NCCL between GPUs, gloo for what is on the CPU."""
    os.environ.update(
        {
            "RANK": str(seat.rank),
            "LOCAL_RANK": str(seat.rank),
            "WORLD_SIZE": str(seat.count),
            "LOCAL_WORLD_SIZE": str(seat.count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(seat.port),
        }
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve, in a container for example
    if seat.cuda:
        torch.cuda.set_device(seat.rank)
    store = dist.TCPStore("127.0.0.1", seat.port, is_master=False)
    backend = "cpu:gloo,cuda:nccl" if seat.cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.count, timeout=limit)
