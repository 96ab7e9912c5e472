"""Workers on the nodes of a Ray cluster: an actor per worker hosts the process and relays its words (`pipeline.node_host`). Lives in the
client's process (`pipeline.ray_client`); the driver's end is `pipeline.cluster_crew`.

Ray says where there is room and when a node is gone; it restarts nothing and carries no tables. What a worker wrote is committed by
the driver, once the driver sees it whole in the run directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster
from pipeline.crew import MemberDied, worker_environment
from pipeline.machine import new_key, offer_seats
from pipeline.messages import Order, ToDriver, ToWorker
from pipeline.node_host import Host, main
from pipeline.ray_gang import RayGang, Room
from pipeline.ray_member import RayMember
from pipeline.ray_sizes import Sizes
from schemas.config import RunConfig
from schemas.secrets import variables_in
from stages.spec import StageSpec

_LISTEN_SECONDS = 5.0
"""A part that is seen late is waited for; then the driver goes on with what was heard so far."""


@dataclass(frozen=True)
class News:
    """What a member has said since, where it is, and its death, if that came after."""

    place: str
    words: tuple[ToDriver, ...]
    death: MemberDied | None


class RayCrew:
    """See `pipeline.crew.Crew`. Members are known by number, since their driver is another process."""

    def __init__(self, config: RunConfig, specs: Sequence[StageSpec], root: Path, logs: Path) -> None:
        self._config, self._root, self._logs = config, root.resolve(), logs.resolve()
        self._cluster = Cluster(config.execution.ray_address)
        self._sizes = Sizes(self._cluster, config)
        try:
            self._sizes.refuse_too_few(specs)
            self._cluster.check(self._root / "_tmp")
        except BaseException:
            self._cluster.close()
            raise
        self._members: dict[int, RayMember | RayGang] = {}
        self._lost: set[str] = set()
        self._started = 0

    def size(self, order: Order) -> int:
        """See Crew: what the config says, or as many as the nodes that live can hold; one where none can, for lost nodes may come back."""
        return self._config.execution.workers or max(1, self._sizes.workers(order.spec))

    def start(self, order: Order) -> tuple[int, Path]:
        """See Crew; its number and its log. Raises UserError where the nodes that live cannot hold it."""
        cores, gpus = self._sizes.needs(order.spec)
        number, log = self._started, self._logs / f"worker-{self._started:03d}.log"
        self._started += 1
        if (nodes := self._sizes.spanned(order.spec)) > 1:
            self._members[number] = self._gang(order, nodes, cores, gpus, log)
        else:
            self._members[number] = self._member(main, (), log, cores, gpus, "SPREAD")
        return number, log

    def _gang(self, order: Order, nodes: int, cores: int, gpus: int, log: Path) -> RayGang:
        """One member a node, all or nothing."""
        bundle = {"CPU": cores} | ({"GPU": gpus} if gpus else {})
        room = Room(self._cluster, [bundle] * nodes)
        first = self._member(main, (), log, cores, gpus, room.place(0))
        key, others = new_key(), []
        for number in range(1, nodes):
            own = log.with_stem(f"{log.stem}-node-{number}")
            others.append(self._member(offer_seats, (key,), own, cores, gpus, room.place(number)))
        return RayGang(room, first, others, key, lambda: self._refuse_fewer(order, nodes))

    def _refuse_fewer(self, order: Order, nodes: int) -> None:
        """Raise UserError where fewer nodes live than the config says; MemberDied where it says none and fewer live than when this one was
        started."""
        if self._sizes.spanned(order.spec) < nodes:
            raise MemberDied("the loss of a node whose room it waited for", counts=False)

    def _member(
        self, entry: Callable[..., None], arguments: tuple[Any, ...], log: Path, cores: int, gpus: int, where: Any
    ) -> RayMember:
        environment = worker_environment(cores) | self._passed_on()
        if not gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        host = self._cluster.ray.remote(
            num_cpus=cores,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={method: 1 for method in ("hear", "tell", "stop", "quit")},
            scheduling_strategy=where,
        )(Host)
        actor = host.remote(log, os.getcwd(), environment, entry, arguments)
        return RayMember(self._cluster, actor, log, self._root, self._lost)

    def wait(self, numbers: Sequence[int], seconds: float) -> dict[int, News]:
        """See Crew: and what they said. Raises ClusterLost when the cluster's head no longer answers."""
        self.check_lives()
        members = {number: self._members[number] for number in numbers}
        replies = [reply for member in members.values() for reply in member.replies]
        self._cluster.ray.wait(replies, num_returns=1, timeout=seconds)
        found, deadline = {}, time.monotonic() + _LISTEN_SECONDS
        for number, member in members.items():
            found[number] = _news(member)
            if time.monotonic() > deadline:
                break
        return found

    def send(self, number: int, message: ToWorker) -> None:
        """See Member."""
        self._members[number].send(message)

    def end(self, number: int, seconds: float) -> None:
        """See Member."""
        self._members.pop(number).end(seconds)

    def kill(self, number: int) -> None:
        """See Member."""
        self._members.pop(number).kill()

    def stop(self) -> None:
        """See Crew."""
        for member in self._members.values():
            member.stop()

    def check_lives(self) -> None:
        """See OnCluster."""
        self._cluster.check_lives()

    def close(self) -> None:
        """See Crew."""
        self._cluster.close()

    def _passed_on(self) -> dict[str, str]:
        """What this process's environment says that a worker must know: keys of services."""
        engines = [*self._config.evaluate_engines, *self._config.judge_engines]
        addresses = [name for engine in engines for name in variables_in(engine.base_url or "")]
        names = {"HF_TOKEN", *(engine.api_key_env for engine in engines), *addresses}
        return {name: os.environ[name] for name in sorted(filter(None, names)) if name in os.environ}


def _news(member: RayMember | RayGang) -> News:
    words: list[ToDriver] = []
    try:
        for word in member.received():
            words.append(word)
    except MemberDied as death:
        return News(member.place, tuple(words), death)
    return News(member.place, tuple(words), None)
