"""Workers on the nodes of a Ray cluster: an actor per worker hosts the process and relays its words (`pipeline.node_host`).

Ray says where there is room and when a node is gone; it restarts nothing and carries no tables. What a worker wrote is committed by
the driver, once the driver sees it whole in the run directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster, Node
from pipeline.crew import Member, MemberDied, worker_environment
from pipeline.executor import Executor
from pipeline.messages import Offered, Order, ToDriver, ToWorker
from pipeline.node_host import Died, Host, Placed
from pipeline.pool import Pool
from pipeline.signals import StopSignals
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.files import await_whole
from schemas.secrets import variables_in

_QUIT_SECONDS = 3.0
_VISIBLE_SECONDS = 60.0
"""A file that another machine wrote may be seen late (NFS caches attributes for up to a minute)."""


class RayMember:
    """See `pipeline.crew.Member`. lost: nodes that took members with them; one that takes many is one death."""

    def __init__(self, cluster: Cluster, actor: Any, log: Path, root: Path, lost: set[str]) -> None:
        self.log, self.place = log, ""
        self._cluster, self._actor, self._root, self._lost, self._node = cluster, actor, root, lost, ""
        self.reply = self._hear()

    def send(self, message: ToWorker) -> None:
        """See Member."""
        if isinstance(message, Order):
            message = replace(
                message, root=self._root, scratch=message.scratch.resolve(), visible_seconds=_VISIBLE_SECONDS
            )
        self._call("tell", message)

    def received(self) -> Iterator[ToDriver]:
        """See Member."""
        for word in self._heard():
            if isinstance(word, Placed):
                self._node = word.node_id
                gpus = f" GPU {','.join(word.gpus)}" if word.gpus else ""
                self.place = f"{self._cluster.name_of(word.node_id)}{gpus}"
            elif isinstance(word, Died):
                raise MemberDied(f"{word.cause} on {self.place}")
            elif isinstance(word, Offered):
                self._await_part(word)
                yield word
            else:
                yield word

    def end(self, seconds: float) -> None:
        """See Member."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._cluster.ray.wait([self.reply], timeout=left)
            try:
                for _ in self.received():
                    pass
            except MemberDied:
                break
        self.kill()

    def kill(self) -> None:
        """See Member. Without the head nothing can be ended from here; a worker ends with the driver's own end."""
        ray = self._cluster.ray
        if not self._cluster.answers:
            return
        if self.place:
            ray.wait([self._call("quit")], timeout=_QUIT_SECONDS)
        ray.kill(self._actor)

    def stop(self) -> None:
        """Ask it to stop at its next safe point."""
        self._call("stop")

    def _heard(self) -> list[Any]:
        ray = self._cluster.ray
        ready, _ = ray.wait([self.reply], timeout=0)
        if not ready:
            return []
        try:
            words: list[Any] = ray.get(self.reply)
        except ray.exceptions.RayError:
            news = self._node not in self._lost
            self._lost.add(self._node)
            raise MemberDied(f"the loss of its node {self.place}".rstrip(), news) from None
        self.reply = self._hear()
        return words

    def _hear(self) -> Any:
        return self._call("hear")

    def _call(self, method: str, *arguments: Any) -> Any:
        """Calls of one method are carried out in their order, those of different ones at the same time."""
        return getattr(self._actor, method).options(concurrency_group=method).remote(*arguments)

    def _await_part(self, offered: Offered) -> None:
        """A node's files may be seen here late: by their hash, never by a listing."""
        temporary = {own: name for name, own in offered.part.moves}
        records = [
            replace(record, path=temporary.get(record.path, record.path)) for record in offered.part.manifest.files
        ]
        if unseen := await_whole(self._root, records, _VISIBLE_SECONDS, thorough=True):
            raise MemberDied(f"what it wrote on {self.place}, which was not seen whole here ({unseen[0].path})")


class RayCrew:
    """See `pipeline.crew.Crew`."""

    def __init__(self, config: RunConfig, root: Path, logs: Path) -> None:
        self._config, self._root, self._logs = config, root.resolve(), logs.resolve()
        self._cluster = Cluster(config.execution.ray_address)
        try:
            self._cluster.check(self._root / "_tmp")
        except BaseException:
            self._cluster.close()
            raise
        self._members: list[RayMember] = []
        self._lost: set[str] = set()
        self._started = 0

    def size(self, order: Order) -> int:
        """See Crew: what the config says, or as many as the nodes that live can hold. Raises UserError where none can hold one."""
        cores, gpus = self._needs(order)
        there = sum(_room(node, cores, gpus) for node in self._cluster.nodes())
        if not there and not self._members:
            raise UserError(
                f"No node of the Ray cluster holds a worker of stage {order.spec.name}: {cores} core(s) and {gpus} GPU(s)",
                where="execution",
                fix="Add such a node, or ask for less (execution.threads, engine.tensor_parallel).",
            )
        return self._config.execution.workers or max(1, there)

    def start(self, order: Order, slot: int, of: int) -> RayMember:
        """See Crew."""
        ray, (cores, gpus) = self._cluster.ray, self._needs(order)
        log = self._logs / f"worker-{self._started:03d}.log"
        self._started += 1
        environment = worker_environment(cores) | self._passed_on()
        if not gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        groups = {method: 1 for method in ("hear", "tell", "stop", "quit")}
        host = ray.remote(
            num_cpus=cores,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups=groups,
            scheduling_strategy="SPREAD",
        )(Host)
        member = RayMember(self._cluster, host.remote(log, os.getcwd(), environment), log, self._root, self._lost)
        self._members.append(member)
        return member

    def wait(self, members: Sequence[Member], seconds: float) -> None:
        """See Crew. Raises UserError when the cluster's head no longer answers."""
        self._cluster.nodes()
        replies = [member.reply for member in members if isinstance(member, RayMember)]
        self._cluster.ray.wait(replies, num_returns=1, timeout=seconds)

    def stop(self) -> None:
        """See Crew."""
        for member in self._members:
            member.stop()

    def close(self) -> None:
        """See Crew."""
        self._cluster.close()

    def _needs(self, order: Order) -> tuple[int, int]:
        """(cores, GPUs) of a worker. Without execution.threads, all of the smallest node's, shared between the workers it holds."""
        nodes, gpus = [node for node in self._cluster.nodes() if node.cpus >= 1], 0
        if self._config.execution.device != "cpu" and order.spec.holds_gpu(self._config):
            nodes_with = [node for node in nodes if node.gpus >= 1]
            if not nodes_with and self._config.execution.device == "cuda":
                raise UserError(
                    "execution.device is cuda, but no node of the Ray cluster has a GPU", where="execution.device"
                )
            if nodes_with:
                most = int(max(node.gpus for node in nodes_with))
                nodes, gpus = nodes_with, max(1, order.spec.gpus_per_worker(self._config, most))
        threads = self._config.execution.threads
        shares = [node.cpus // max(1, node.gpus // gpus if gpus else 1) for node in nodes]
        return threads or max(1, int(min(shares, default=1))), gpus

    def _passed_on(self) -> dict[str, str]:
        """What this process's environment says that a worker must know: keys of services."""
        engines = [*self._config.evaluate_engines, *self._config.judge_engines]
        addresses = [name for engine in engines for name in variables_in(engine.base_url or "")]
        names = {"HF_TOKEN", *(engine.api_key_env for engine in engines), *addresses}
        return {name: os.environ[name] for name in sorted(filter(None, names)) if name in os.environ}


def ray_executor(config: RunConfig, root: Path, logs: Path, signals: StopSignals) -> Executor:
    """The executor on a Ray cluster."""
    return Pool(RayCrew(config, root, logs), config.execution, signals)


def _room(node: Node, cores: int, gpus: int) -> int:
    return int(min(node.cpus // cores, node.gpus // gpus if gpus else node.cpus // cores))
