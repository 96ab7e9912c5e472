"""Several processes that train together: on this machine, one per GPU or, with gloo, on the CPU; and on other machines (`host.py`).

The stage's own process starts them, passes on what the first of them says, tells all to stop, and ends all when one dies or fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TypeVar

import torch.distributed as dist

from schemas.errors import UserError
from stages.contract import Context, MachineLost, Stopped
from stages.models.device import device_of
from stages.train.host import Far, Invitation
from stages.train.memory import less_memory
from stages.train.peers import peer_limit
from stages.train.seat import LOOPBACK, Broke, Ended, Group, Lost, Progressed, Refused, Seat, Word, Work, interface_of

T = TypeVar("T")
_COLLECT_SECONDS = 2.0
"""When one process fails the others fail of it: so long causes are collected before the first one is named."""
_LEAVE_SECONDS = 20.0
"""For the others to end after the first one did: the result is there."""

_ABORTED = "SIGABRT"


@dataclass
class _Member:
    """A process: where it is, if not here; its last word, what it died of, and whether its machine is gone."""

    rank: int
    count: int
    machine: str = ""
    said: Ended | Refused | Broke | None = None
    death: str = ""
    lost: bool = False

    @property
    def failed(self) -> bool:
        return isinstance(self.said, Refused | Broke) or (self.said is None and bool(self.death))

    @property
    def name(self) -> str:
        """In words."""
        place = f" on {self.machine}" if self.machine else ""
        return f"process {self.rank} of the {self.count} that train together{place}"


def run_together(job: Callable[[Context], T], ctx: Context, processes: int) -> T:
    """`job(ctx)` in so many processes on this machine and each of `ctx.machines`; what it returns in the first.

    Raises what the job raised if that is a UserError or Stopped, RuntimeError for any other failure, and UserError when a
    process died or a machine is lost or silent.
    """
    cuda, work = device_of(ctx.config).type == "cuda", Work.of(job, ctx)
    count = processes * (1 + len(ctx.machines))
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        others = []
        for machine in ctx.machines:
            others.append(Far(machine, peer_limit(ctx.config)))
            stack.callback(others[-1].close)
        interface = others[0].interface if others else interface_of(LOOPBACK)
        seats = [Seat(n, count, n, processes, LOOPBACK, store.port, interface, cuda) for n in range(processes)]
        here = Group(work, seats)
        stack.callback(here.close)
        members = [_Member(rank, count) for rank in range(processes)]
        for other in others:
            other.start(Invitation(work, len(members), processes, count, store.port, cuda))
            members += [_Member(rank, count, other.name) for rank in range(len(members), len(members) + processes)]
        _attend(members, [here, *others], ctx)
    return _result(members, cuda)


def _attend(members: list[_Member], groups: Sequence[Group | Far], ctx: Context) -> None:
    """Until all have ended, or one failed."""
    told, ending_since = False, 0.0
    while any(not member.death for member in members):
        if ctx.stop() and not told:
            told = True
            for group in groups:
                group.stop()
        wait([each for group in groups for each in group.waited], timeout=0.2)
        for group in groups:
            for rank, word in group.heard():
                _hear(members[rank], word, ctx)
        failed = any(member.failed for member in members)
        if not ending_since and (failed or isinstance(members[0].said, Ended)):
            ending_since = time.monotonic()
        if ending_since and time.monotonic() - ending_since > (_COLLECT_SECONDS if failed else _LEAVE_SECONDS):
            return


def _hear(member: _Member, word: Word, ctx: Context) -> None:
    match word:
        case Progressed(method, arguments, rates):
            getattr(ctx.progress, method)(*arguments, **rates)
        case Lost(cause, machine):
            member.death, member.lost = cause, machine
        case _:
            member.said = word


def _result(members: list[_Member], cuda: bool) -> T:  # type: ignore[type-var]
    if any(member.failed for member in members):
        raise _cause(members, cuda)
    ends = [member.said for member in members if isinstance(member.said, Ended)]
    if any(end.stopped for end in ends):
        raise Stopped
    result: T = ends[0].result
    return result


def _cause(members: list[_Member], cuda: bool) -> Exception:
    """The first cause: what a process refused, else one that died without a word, else the earliest error of the code: the others
    lose their connection to that process. cuda: they talk by NCCL, whose watchdog aborts a process that waits too long for another."""
    for member in members:
        if isinstance(member.said, Refused):
            return member.said.error
    for member in members:
        if member.said is None and member.death:
            died = f"{member.name} died by {member.death}"
            if cuda and _ABORTED in member.death:
                return _aborted(died)
            return _ended(died, MachineLost if member.lost else UserError)
    broke = [(member.said.when, member.rank, member.said) for member in members if isinstance(member.said, Broke)]
    _, rank, error = min(broke, key=lambda entry: entry[0])
    if error.out_of_memory:
        return _ended(f"{members[rank].name} ran out of memory: {error.what}")
    failure = RuntimeError(f"{members[rank].name}: {error.what}")
    failure.__cause__ = error.system
    return failure


def _ended(what: str, kind: type[UserError] = UserError) -> UserError:
    return kind(
        f"{what}; the others were ended",
        where="train.processes",
        fix=f"The worker's log may say more; a {less_memory('train')}",
    )


def _aborted(what: str) -> UserError:
    return UserError(
        f"{what}; the others were ended. NCCL ends a process so that waited for another longer than allowed, or after an error of CUDA",
        where="execution.peer_minutes",
        fix="The worker's log says which, and whom it waited for; a longer limit waits longer. The same command continues from the last checkpoint.",
    )
