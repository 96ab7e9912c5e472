"""Workers on a Ray cluster as the driver has them: `pipeline.ray_crew` at the other end of a pipe."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.cluster import Cluster
from pipeline.crew import Member, MemberDied
from pipeline.executor import Executor
from pipeline.messages import Order, ToDriver, ToWorker
from pipeline.pool import Pool
from pipeline.ray_client import GONE, RayClient
from pipeline.ray_crew import News, RayCrew
from pipeline.ray_sizes import Sizes
from pipeline.signals import StopSignals
from schemas.config import RunConfig
from stages.spec import StageSpec


class ClusterMember:
    """See `pipeline.crew.Member`."""

    def __init__(self, client: RayClient[RayCrew], number: int, log: Path) -> None:
        self.log, self.place, self.number = log, "", number
        self._client = client
        self._words: deque[ToDriver] = deque()
        self._death: MemberDied | None = None

    def heard(self, news: News) -> None:
        """What it has said, for `received`."""
        self.place, self._death = news.place, news.death
        self._words.extend(news.words)

    def send(self, message: ToWorker) -> None:
        """See Member."""
        with suppress(*GONE):  # `ClusterCrew.wait` says so
            self._client.call(RayCrew.send, self.number, message)

    def received(self) -> Iterator[ToDriver]:
        """See Member."""
        while self._words:
            yield self._words.popleft()
        if self._death is not None:
            raise self._death

    def end(self, seconds: float) -> None:
        """See Member."""
        with suppress(*GONE):  # it ends with the client
            self._client.call(RayCrew.end, self.number, seconds)

    def kill(self) -> None:
        """See Member."""
        self._words.clear()
        with suppress(*GONE):  # it ends with the client
            self._client.call(RayCrew.kill, self.number)


class ClusterCrew:
    """See `pipeline.crew.Crew`. Raises UserError for a cluster that cannot carry out the stages."""

    def __init__(self, config: RunConfig, specs: Sequence[StageSpec], root: Path, logs: Path) -> None:
        self._client = RayClient(RayCrew, (config, tuple(specs), root, logs), logs / "ray.log")

    def size(self, order: Order) -> int:
        """See Crew."""
        return self._client.call(RayCrew.size, order)

    def start(self, order: Order, slot: int, of: int) -> ClusterMember:
        """See Crew. Raises UserError where the nodes that live cannot hold it."""
        return ClusterMember(self._client, *self._client.call(RayCrew.start, order))

    def wait(self, members: Sequence[Member], seconds: float) -> None:
        """See Crew. Raises ClusterLost when the cluster's head no longer answers, ClientFailed when something broke in Ray's client."""
        own = {member.number: member for member in members if isinstance(member, ClusterMember)}
        for number, news in self._client.call(RayCrew.wait, tuple(own), seconds).items():
            own[number].heard(news)

    def stop(self) -> None:
        """See Crew."""
        self._client.call(RayCrew.stop)

    def close(self) -> None:
        """See Crew."""
        self._client.close()


def ray_executor(
    config: RunConfig, specs: Sequence[StageSpec], root: Path, logs: Path, signals: StopSignals
) -> Executor:
    """The executor on a Ray cluster. Raises UserError for one that cannot carry out the stages."""
    return Pool(ClusterCrew(config, specs, root, logs), config.execution, signals)


def cluster_client(config: RunConfig) -> RayClient[Cluster]:
    """A look at the cluster, without a run and without a log."""
    return RayClient(Cluster, (config.execution.ray_address,), Path(os.devnull))


def refuse_unreachable(config: RunConfig, specs: Sequence[StageSpec]) -> None:
    """Raise UserError where no cluster answers, or none that is large enough for the stages."""
    client = cluster_client(config)
    try:
        client.call(_refuse_too_few, config, tuple(specs))
    finally:
        client.close()


def _refuse_too_few(cluster: Cluster, config: RunConfig, specs: Sequence[StageSpec]) -> None:
    Sizes(cluster, config).refuse_too_few(specs)
