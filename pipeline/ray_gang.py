"""Workers on several nodes of a Ray cluster that train together: to the pool one member, the one on the first node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster
from pipeline.crew import MemberDied
from pipeline.machine import Listening
from pipeline.messages import Order, Refused, ToDriver, ToWorker
from pipeline.probe import refuse_other_versions, versions
from pipeline.ray_member import RayMember
from stages.contract import Machine, MachineLost

_COUNT_SECONDS = 5.0


class Room:
    """A placement group: a bundle of resources on each of several nodes, all or nothing."""

    def __init__(self, cluster: Cluster, bundles: Sequence[dict[str, int]]) -> None:
        self._util = cluster.ray.util
        self._group = self._util.placement_group(list(bundles), strategy="STRICT_SPREAD")

    def place(self, bundle: int) -> Any:
        """Where an actor goes that takes this bundle."""
        return self._util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, bundle)

    def give_back(self) -> None:
        """For others to use."""
        self._util.remove_placement_group(self._group)


class RayGang:
    """See `pipeline.crew.Member`. The first gets its orders once the others offer seats. still_there: raises UserError or MemberDied
    when too few nodes live to hold it, asked while it waits for room."""

    def __init__(
        self, room: Room, first: RayMember, others: list[RayMember], key: bytes, still_there: Callable[[], object]
    ) -> None:
        self.log: Path = first.log
        self._room, self._first, self._others, self._key = room, first, others, key
        self._ports: dict[int, int] = {}
        self._order: Order | None = None
        self._still_there, self._asked = still_there, time.monotonic()

    @property
    def place(self) -> str:
        """See Member: of all."""
        places = [member.place for member in (self._first, *self._others)]
        return " + ".join(places) if all(places) else ""

    @property
    def replies(self) -> list[Any]:
        """See RayMember."""
        return [reply for member in (self._first, *self._others) for reply in member.replies]

    def send(self, message: ToWorker) -> None:
        """See Member."""
        if isinstance(message, Order):
            self._order = message
        else:
            self._first.send(message)

    def received(self) -> Iterator[ToDriver]:
        """See Member. One that dies is the death of all. Raises UserError for one that runs other versions."""
        for number, other in enumerate(self._others):
            for word in other.received():
                if isinstance(word, Listening):
                    refuse_other_versions(other.place, word.versions, versions())
                    self._ports[number] = word.port
        if self._order is not None:
            self._pass_on(self._order)
        for word in self._first.received():
            if isinstance(word, Refused) and isinstance(word.error, MachineLost):  # it noticed before the cluster did
                raise MemberDied(f"{word.error.what}")
            yield word

    def end(self, seconds: float) -> None:
        """See Member."""
        self._first.end(seconds)
        self.kill()

    def kill(self) -> None:
        """See Member."""
        for member in (self._first, *self._others):
            member.kill()
        self._room.give_back()

    def stop(self) -> None:
        """Ask the training to stop at its next safe point: the first tells the others."""
        self._first.stop()

    def _pass_on(self, order: Order) -> None:
        """The order to the first, once all others offer seats."""
        if len(self._ports) == len(self._others):
            machines = tuple(
                Machine(other.place, (other.address, self._ports[number]), self._key)
                for number, other in enumerate(self._others)
            )
            self._first.send(replace(order, machines=machines))
            self._order = None
        elif not self.place and time.monotonic() - self._asked > _COUNT_SECONDS:
            self._asked = time.monotonic()
            self._still_there()
