"""A worker on a node of a Ray cluster, as the driver has it: an actor that hosts the process and relays its words (`pipeline.node_host`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster
from pipeline.crew import MemberDied
from pipeline.messages import Offered, Order, ToWorker
from pipeline.node_host import Died, Placed
from pipeline.probe import versions
from pipeline.settled import VISIBLE_SECONDS
from schemas.errors import last_line
from schemas.files import await_whole

_QUIT_SECONDS = 3.0


class RayMember:
    """See `pipeline.crew.Member`. lost: nodes that took members with them; one that takes many is one death."""

    def __init__(self, cluster: Cluster, actor: Any, log: Path, root: Path, lost: set[str]) -> None:
        self.log, self.place = log, ""
        self._cluster, self._actor, self._root, self._lost, self._node = cluster, actor, root, lost, ""
        self._reply = self._hear()

    @property
    def replies(self) -> list[Any]:
        """What Ray finds ready when it has said something, or is gone."""
        return [self._reply]

    @property
    def address(self) -> str:
        """Where others reach its node."""
        return self._cluster.address_of(self._node)

    def send(self, message: ToWorker) -> None:
        """See Member."""
        if isinstance(message, Order):
            message = replace(
                message,
                root=self._root,
                scratch=message.scratch.resolve(),
                visible_seconds=VISIBLE_SECONDS,
                versions=versions(),
            )
        self._call("tell", message)

    def received(self) -> Iterator[Any]:
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
            self._cluster.ray.wait([self._reply], timeout=left)
            try:
                for _ in self.received():
                    pass
            except MemberDied:
                break
        self.kill()

    def kill(self) -> None:
        """See Member."""
        ray = self._cluster.ray
        if self.place:
            ray.wait([self._call("quit")], timeout=_QUIT_SECONDS)
        ray.kill(self._actor)

    def stop(self) -> None:
        """Ask it to stop at its next safe point."""
        self._call("stop")

    def _heard(self) -> list[Any]:
        ray = self._cluster.ray
        ready, _ = ray.wait([self._reply], timeout=0)
        if not ready:
            return []
        try:
            words: list[Any] = ray.get(self._reply)
        except ray.exceptions.RayError as error:
            if not self._node:  # it never came to life: Ray knows why
                raise MemberDied(f"what Ray says before it had started: {last_line(error)}") from None
            news = self._node not in self._lost
            self._lost.add(self._node)
            raise MemberDied(f"the loss of its node {self.place}", news) from None
        self._reply = self._hear()
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
        if unseen := await_whole(self._root, records, VISIBLE_SECONDS, thorough=True):
            raise MemberDied(f"what it wrote on {self.place}, which was not seen whole here ({unseen[0].path})")
