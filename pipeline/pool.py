"""An executor over a crew of workers: hands out shards, takes parts, replaces the dead, ends those that hang.

The shard is the unit of work and of retry. The shards of a worker that dies (out of memory, a crash in native code) go back
to the queue; a stage whose workers keep dying without finishing anything ends the run.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass, field, replace

from pipeline.commit import withdraw
from pipeline.crew import Crew, Member, MemberDied
from pipeline.executor import Reports
from pipeline.executor_errors import Interrupted, StageFailed
from pipeline.messages import (
    Advanced,
    Assigned,
    Broke,
    Done,
    Leave,
    Limited,
    Noted,
    Offered,
    Order,
    Refused,
    ToDriver,
    Total,
    Want,
)
from pipeline.signals import StopSignals
from schemas.config.training import ExecutionConfig
from schemas.errors import UserError
from stages.contract import Share

_MAX_DEATHS = 3
_CLOSE_SECONDS = 10.0
_COUNT_SECONDS = 5.0
_STARTING_SECONDS = 30.0
"""So long a member without a place may only be starting; after that it waits for room."""
_PATIENT_SECONDS = 60.0
"""After so long it is said that members wait for room."""


@dataclass
class _Seat:
    """A member at work. joined: it was reported to have a place. holds: the shards it took and has not offered. told: when it was given
    the order. heard: when it last made progress, or had no place yet."""

    member: Member
    slot: int
    joined: bool = False
    holds: set[int] = field(default_factory=set)
    busy: bool = False
    told: float = 0.0
    heard: float = 0.0


@dataclass
class _Job:
    """An order while it is carried out. queue: shards that nobody holds. of: members that share it. at_once: the most of them that had a
    place at one time. deaths: since a part was last committed. counted: when it was last asked how many there
    could be. asked: when the members were asked to stop. waiting: members that were said to wait for room."""

    order: Order
    reports: Reports
    queue: deque[int]
    of: int
    at_once: int = 0
    deaths: int = 0
    counted: float = 0.0
    asked: float = 0.0
    waiting: int = 0

    @property
    def sharded(self) -> bool:
        return self.order.spec.kind == "shard"


class Pool:
    """See `pipeline.executor.Executor`. Keeps its members between orders that share an engine."""

    def __init__(self, crew: Crew, execution: ExecutionConfig, signals: StopSignals) -> None:
        self._crew, self._execution, self._signals = crew, execution, signals
        self._seats: list[_Seat] = []
        self._key: str | None = None
        self._limits: dict[str, int] = {}

    def run(self, order: Order, key: str | None, reports: Reports) -> None:
        """See Executor."""
        with self._signals.deferred():
            if key is None or key != self._key:
                self._dismiss()
            self._key = key
            job = _Job(order, reports, deque(sorted(order.shards)), 1, counted=time.monotonic())
            if job.sharded:
                job.of = min(self._crew.size(order), len(job.queue))
            while len(self._seats) < job.of:
                self._seats.append(self._start(job))
            for seat in self._seats[: job.of]:
                self._give(job, seat)
            self._attend(job)
            self._signals.raise_if_asked()

    def close(self) -> None:
        """See Executor."""
        self._dismiss()
        self._crew.close()

    def _dismiss(self) -> None:
        """End all members. Where nothing runs, what is loaded is closed first, by all at once."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        for seat in self._seats:
            if seat.busy:
                seat.member.kill()
            else:
                seat.member.send(Leave())
        for seat in self._seats:
            if not seat.busy:
                seat.member.end(max(0.0, deadline - time.monotonic()))
        self._seats, self._key = [], None

    def _start(self, job: _Job) -> _Seat:
        slot = min(set(range(len(self._seats) + 1)) - {seat.slot for seat in self._seats})  # of one that died
        return _Seat(self._crew.start(job.order, slot, job.of), slot)

    def _give(self, job: _Job, seat: _Seat) -> None:
        """Send the order. A stage that is not cut into shards holds its one part from the start."""
        seat.busy, seat.holds, seat.told = True, set(), time.monotonic()
        seat.heard = seat.told
        if not job.sharded:
            seat.holds = set(job.order.shards)
            if seat.joined:
                self._begun(job, seat)
        seat.member.send(
            replace(job.order, shards={}, limits=dict(self._limits), share=self._share(job, seat)),
        )

    def _share(self, job: _Job, seat: _Seat) -> Share:
        """What a limit of the whole run is divided by: those that have a place, as many as there were at once, so that it holds while
        some are done already, and those that may have one in a moment. Not those that wait for room."""
        now, busy = time.monotonic(), [other for other in self._seats if other.busy]
        placed = sum(bool(other.member.place) for other in busy)
        starting = sum(not other.member.place and now - other.told < _STARTING_SECONDS for other in busy)
        job.at_once = max(job.at_once, placed)
        of = max(job.at_once, placed + starting, 1)
        return Share(seat.slot % of, of)

    def _begun(self, job: _Job, seat: _Seat) -> None:
        for index in sorted(seat.holds):
            job.reports.started(index, seat.member.place)

    def _attend(self, job: _Job) -> None:
        while busy := [seat for seat in self._seats if seat.busy]:
            job.reports.tick()
            if self._signals.asked:
                self._stop(job)
            if self._signals.asked or (job.sharded and not job.queue and not any(seat.holds for seat in busy)):
                busy = self._without_pending(busy)
            self._say_who_waits(job, busy)
            self._grow(job, len(busy))
            self._crew.wait([seat.member for seat in busy], 0.5)
            for seat in busy:
                try:
                    for message in seat.member.received():
                        self._hear(job, seat, message)
                        if not seat.busy:
                            break
                except MemberDied as death:
                    self._replace(job, seat, death.cause, death.counts)
                else:
                    if seat.busy and (cause := self._hangs(seat)):
                        self._replace(job, seat, cause)

    def _stop(self, job: _Job) -> None:
        """Pass the signal on once; raise Interrupted when the time that it left is over."""
        if not job.asked:
            job.asked = time.monotonic()
            self._crew.stop()
            job.reports.note(
                f"{signal.Signals(self._signals.asked).name}: stopping at the next safe point, in "
                f"{self._execution.grace_seconds:.0f} s at the latest; once more to stop now"
            )
        if time.monotonic() - job.asked > self._execution.grace_seconds:
            raise Interrupted(self._signals.asked)

    def _say_who_waits(self, job: _Job, busy: list[_Seat]) -> None:
        """When members have waited for room for long, and whenever their number has changed since."""
        waiting = [seat for seat in busy if not seat.member.place]
        longest = max((time.monotonic() - seat.told for seat in waiting), default=0.0)
        if len(waiting) != job.waiting and (not waiting or longest > _PATIENT_SECONDS):
            job.waiting = len(waiting)
            if waiting:
                job.reports.note(f"{len(waiting)} of {len(busy)} worker(s) wait for room on the cluster")

    def _without_pending(self, busy: list[_Seat]) -> list[_Seat]:
        """Nothing is left for members that still wait for room."""
        for seat in busy:
            if not seat.member.place:
                seat.member.kill()
                self._seats.remove(seat)
        return [seat for seat in busy if seat.member.place]

    def _grow(self, job: _Job, at_work: int) -> None:
        """More members where there is room for more than there was."""
        if not job.sharded or not job.queue or self._signals.asked or time.monotonic() - job.counted < _COUNT_SECONDS:
            return
        job.counted = time.monotonic()
        for _ in range(min(self._crew.size(job.order), at_work + len(job.queue)) - at_work):
            self._add(job)

    def _add(self, job: _Job) -> None:
        """One more member at work: one that is idle, since a new one may find no room beside it, or a new one."""
        seat = next((seat for seat in self._seats if not seat.busy), None)
        if seat is None:
            seat = self._start(job)
            self._seats.append(seat)
        self._give(job, seat)

    def _hear(self, job: _Job, seat: _Seat, message: ToDriver) -> None:
        if not seat.joined:
            seat.joined, seat.heard = True, time.monotonic()
            job.reports.joined(seat.member.place, seat.member.log)
            if not job.sharded:
                self._begun(job, seat)
        if isinstance(message, Want | Offered | Total) or (isinstance(message, Advanced) and message.amount):
            seat.heard = time.monotonic()
        match message:
            case Want():
                index = job.queue.popleft() if job.queue and not self._signals.asked else None
                if index is not None:
                    seat.holds.add(index)
                    job.reports.started(index, seat.member.place)
                shard = None if index is None else job.order.shards[index]
                seat.member.send(Assigned(shard, self._share(job, seat)))
            case Offered(part):
                if part.index not in seat.holds:  # it was given to another meanwhile
                    withdraw(job.order.root, part)
                    return
                job.reports.offered(part, seat.member.place)
                seat.holds.discard(part.index)
                job.deaths = 0
            case Advanced(amount, rates):
                job.reports.advance(amount, rates, seat.member.place)
            case Total(amount, unit):
                job.reports.total(amount, unit)
            case Noted(text):
                job.reports.note(text)
            case Limited(limits):
                self._limits.update(limits)
            case Done():
                seat.busy = False
                if seat.holds and not self._signals.asked:
                    what = f"shards {sorted(seat.holds)} were taken but not returned"
                    raise StageFailed(job.order.spec.name, what, "", seat.member.log)
            case Refused(error):
                seat.busy = False
                raise error
            case Broke(what, trace):
                seat.busy = False
                raise StageFailed(job.order.spec.name, what, trace, seat.member.log)

    def _hangs(self, seat: _Seat) -> str:
        """Why the member is taken to hang; empty if it is not."""
        if not seat.member.place:  # it waits for room, and has nothing to do yet
            seat.heard = time.monotonic()
            return ""
        minutes = self._execution.watchdog_minutes
        if not minutes or time.monotonic() - seat.heard <= 60 * minutes:
            return ""
        return f"the watchdog after {minutes:g} minutes without any progress (execution.watchdog_minutes)"

    def _replace(self, job: _Job, seat: _Seat, cause: str, counts: bool = True) -> None:
        """Another member for one that died or hangs; what it held goes back to the queue."""
        seat.busy = False
        seat.member.kill()
        self._seats.remove(seat)
        job.deaths += counts
        if self._signals.asked or not (job.sharded or seat.holds):
            return
        if job.deaths >= _MAX_DEATHS:
            raise UserError(
                f"{job.order.spec.name}: {job.deaths} worker processes died one after another without finishing a shard; "
                f"the last by {cause}",
                where=str(seat.member.log) if seat.member.log.exists() else "they wrote no log",
                fix="Look at the end of the log; fewer execution.workers or smaller batches need less memory. "
                "Nothing that was finished is lost: the same command continues.",
            )
        job.reports.note(f"a worker died ({cause}); starting another")
        if job.sharded:
            job.queue.extendleft(sorted(seat.holds, reverse=True))
            if not job.queue:
                return
        self._add(job)
