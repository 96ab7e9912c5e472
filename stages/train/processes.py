"""Several processes that train together on one machine, one per GPU or, with gloo, on the CPU.

The stage's own process starts them, passes on what the first of them says, tells all to stop, and ends all when one dies or fails.
They share its process group and log, so that whoever ends the worker ends them too.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context, set_forkserver_preload
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from schemas.config import RunConfig
from schemas.errors import UserError, first_line
from stages.contract import Context, Silent, Stopped
from stages.gradients.batching import is_out_of_memory
from stages.models.device import device_of
from stages.train.memory import less_memory
from stages.train.peers import beating, peer_limit, wait_for_the_first

T = TypeVar("T")
Job = Callable[[Context], T]
_PR_SET_PDEATHSIG = 1
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


def count() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process reports and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any of the processes: the same answer in all of them, which must all ask."""
    if count() == 1:
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def from_first(compute: Callable[[], T], config: RunConfig) -> T:
    """What the first process computes, in all of them, which must all ask. Stopped, if it raises that, is raised in all; UserError when
    it is silent for longer than `execution.peer_minutes`."""
    if count() == 1:
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


@dataclass
class _Member:
    process: BaseProcess
    connection: Connection | None
    said: tuple[Any, ...] = ()


class _Told:
    """Progress of the first process, told to the stage's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def total(self, amount: int, unit: str) -> None:
        self._connection.send(("total", amount, unit))

    def advance(self, amount: int = 1, **rates: float) -> None:
        self._connection.send(("advance", amount, rates))

    def note(self, message: str) -> None:
        self._connection.send(("note", message))


def run_together(job: Job[T], ctx: Context, processes: int) -> T:
    """`job(ctx)` in so many processes; what it returns in the first.

    Raises what the job raised if that is a UserError or Stopped, RuntimeError for any other failure, and UserError when a
    process died.
    """
    cuda = device_of(ctx.config).type == "cuda"
    # A CUDA process cannot be forked; elsewhere one import of torch and TRL serves all.
    context: Any = get_context("spawn" if cuda else "forkserver")
    if not cuda:
        set_forkserver_preload([job.__module__])
    stop = context.RawValue("b", 0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parts = {name: getattr(ctx, name) for name in ("config", "round", "inputs", "models", "folder", "limits")}
    members: list[_Member] = []
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (_Seat(rank, processes, store.port, cuda), theirs, job, parts, stop)
            process = context.Process(target=_main, args=arguments, name=f"congrad-train-{rank}")
            process.start()
            theirs.close()
            members.append(_Member(process, ours))
        return _attend(members, ctx, stop)
    finally:
        for member in members:
            member.process.kill()
            member.process.join()
            if member.connection is not None:
                member.connection.close()


def _attend(members: list[_Member], ctx: Context, stop: Any) -> Any:
    failed_at = 0.0
    while any(member.process.is_alive() or member.connection for member in members):
        if ctx.stop():
            stop.value = 1
        connections = [member.connection for member in members if member.connection is not None]
        wait([*connections, *(m.process.sentinel for m in members if m.process.is_alive())], timeout=0.2)
        for member in members:
            _hear(member, ctx)
        if not failed_at and any(_failed(member) for member in members):
            failed_at = time.monotonic()
        if failed_at and time.monotonic() - failed_at > _COLLECT_SECONDS:
            break
    for member in members:
        _hear(member, ctx)
    if any(_failed(member) for member in members):
        _raise_cause(members)
    if any(member.said[0] == "stopped" for member in members):
        raise Stopped
    return members[0].said[1]


def _hear(member: _Member, ctx: Context) -> None:
    try:
        while member.connection is not None and member.connection.poll():
            message = member.connection.recv()
            if message[0] in ("total", "note"):
                getattr(ctx.progress, message[0])(*message[1:])
            elif message[0] == "advance":
                ctx.progress.advance(message[1], **message[2])
            else:
                member.said = message
    except (EOFError, OSError):
        assert member.connection is not None
        member.connection.close()
        member.connection = None


def _failed(member: _Member) -> bool:
    if member.said:
        return member.said[0] in ("refused", "broke")
    return not member.process.is_alive() and member.connection is None


def _raise_cause(members: list[_Member]) -> None:
    """The first cause: what a process refused, else one that died without a word, else the earliest error of the code: the others
    lose their connection to that process."""
    for member in members:
        if member.said and member.said[0] == "refused":
            raise member.said[1]
    for rank, member in enumerate(members):
        if not member.said and not member.process.is_alive():
            member.process.join()
            code = member.process.exitcode or 0
            cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            memory = ", most often the system was out of memory" if code == -signal.SIGKILL else ""
            raise _ended(f"process {rank} of the {len(members)} that train together died by {cause}{memory}")
    broke = [
        (member.said[1], rank, member.said) for rank, member in enumerate(members) if member.said[:1] == ("broke",)
    ]
    _, rank, (_, _, out_of_memory, error) = min(broke, key=lambda entry: entry[0])
    if out_of_memory:
        raise _ended(f"process {rank} of the {len(members)} that train together ran out of memory: {error}")
    raise RuntimeError(f"process {rank} of the {len(members)} that train together: {error}")


def _ended(what: str) -> UserError:
    return UserError(
        f"{what}; the others were ended",
        where="train.processes",
        fix=f"The worker's log may say more; a {less_memory('train')}",
    )


def _main(seat: _Seat, connection: Connection, job: Job[Any], parts: dict[str, Any], stop: Any) -> None:
    """Entry point of a process."""
    # Whoever started this decides when it ends: a scheduler's signal to the whole job is for the driver.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    progress = _Told(connection) if seat.rank == 0 else Silent()
    ctx = Context(**parts, progress=progress, stop=lambda: bool(stop.value))
    try:
        _join(seat, peer_limit(ctx.config))
        result = job(ctx)
    except Stopped:
        connection.send(("stopped",))
    except UserError as error:
        connection.send(("refused", error))
        os._exit(1)  # the group's threads may wait for the others for ever
    except Exception as error:
        when = time.monotonic()  # of one clock in all processes of the machine
        logging.getLogger(__name__).exception("process %d", seat.rank)
        what = first_line(error) if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        connection.send(("broke", when, is_out_of_memory(error), what))
        os._exit(1)
    else:
        connection.send(("done", result if seat.rank == 0 else None))
    connection.close()
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
