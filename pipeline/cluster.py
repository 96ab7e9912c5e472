"""A Ray cluster that runs already, and this process as its client (`pipeline.ray_client`). Starts none."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.probe import Look, look, probe_in, refuse_others
from schemas.errors import UserError, first_line, last_line

_WATCH_SECONDS = 2.0
_LOST_SECONDS = 20.0
_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 60.0
AGAIN = "Start it, or a new one (docs/scale.md): the same command continues."


class ClusterLost(UserError):
    """A cluster that answered no longer does."""


@dataclass(frozen=True)
class Node:
    """A node that lives. name: unique in the cluster. address: where others reach it."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: float


@dataclass
class _Seen:
    """What the watching thread saw last, and when it last saw anything."""

    nodes: list[Node] = field(default_factory=list)
    when: float = 0.0


class Cluster:
    """See the module. Raises UserError for an address where none answers."""

    def __init__(self, address: str) -> None:
        self._address, self._seen, self._ended = _address(address), _Seen(), threading.Event()
        self.ray = _connected(self._address)
        self._look()
        threading.Thread(target=self._watch, name="cluster", daemon=True).start()

    def nodes(self) -> list[Node]:
        """Nodes that live, as last seen. Raises ClusterLost when the cluster's head no longer answers."""
        self.check_lives()
        return self._seen.nodes

    def check_lives(self) -> None:
        """Raise ClusterLost when the cluster's head no longer answers. Asks nobody: the watching thread does."""
        if time.monotonic() - self._seen.when > _LOST_SECONDS:
            raise ClusterLost(
                f"The Ray cluster no longer answers (nothing for {_LOST_SECONDS:.0f} s)",
                where=f"execution.ray_address: {self._address}",
                fix=AGAIN,
            )

    def name_of(self, node_id: str) -> str:
        """A node's name; of one that is not seen, its id."""
        node = self._node(node_id)
        return node.name if node else node_id[:8]

    def address_of(self, node_id: str) -> str:
        """Where others reach a node; empty for one that is not seen."""
        node = self._node(node_id)
        return node.address if node else ""

    def _node(self, node_id: str) -> Node | None:
        """One that joined a moment ago is looked for once more."""
        for look_again in (True, False):
            for node in self._seen.nodes:
                if node.id == node_id:
                    return node
            if look_again:
                self._look()
        return None

    def check(self, root: Path) -> dict[str, Look]:
        """Look at every node that could have a worker: name -> what it is. Raises UserError where one does not read what is written
        in `root`, runs other versions than this process, or does not answer."""
        with probe_in(root) as (probe, expected):
            found, mine = self.look(probe), look(probe)
        refuse_others(found, mine, expected, root)
        return found

    def look(self, probe: Path) -> dict[str, Look]:
        """`probe.look` on every node that could have a worker. Raises UserError for nodes that do not answer."""
        ray = self.ray
        hosts = [node for node in self.nodes() if node.cpus >= 1]
        remote = ray.remote(look)
        pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {
            remote.options(num_cpus=0, max_retries=0, scheduling_strategy=pin(node.id, soft=False)).remote(probe): node
            for node in hosts
        }
        ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_SECONDS)
        found, silent = {}, []
        for reference, node in asked.items():
            try:
                found[node.name] = ray.get(reference, timeout=0)
            except ray.exceptions.GetTimeoutError:
                silent.append(node.name)
            except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
                continue  # it was lost meanwhile: none to work on
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"Node {node.name} cannot run the pipeline: {last_line(error)}",
                    fix="Install the same version of the pipeline on every node, for the Python that Ray runs with there.",
                ) from error
        if silent:
            raise UserError(
                f"{len(silent)} node(s) of the cluster did not answer within {_LOOK_SECONDS:.0f} s: {', '.join(silent[:5])}",
                fix="See `ray status`; stop what hangs there, or take the node out.",
            )
        if not found:
            raise UserError(
                "No node of the Ray cluster has a core to offer",
                where="execution.ray_address",
                fix="Start workers: ray start --address=…",
            )
        return found

    def close(self) -> None:
        """Leave the cluster."""
        self._ended.set()
        self.ray.shutdown()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_SECONDS):
            with suppress(Exception):  # what it is, `nodes` says: nothing was seen for too long
                self._look()

    def _look(self) -> None:
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        names = [
            node["NodeName"] if node["NodeName"] != node["NodeManagerAddress"] else node["NodeManagerHostname"]
            for node in alive
        ]
        self._seen = _Seen(
            [
                Node(
                    node["NodeID"],
                    name if names.count(name) == 1 else f"{name}-{node['NodeID'][:6]}",
                    node["NodeManagerAddress"],
                    node["Resources"].get("CPU", 0.0),
                    node["Resources"].get("GPU", 0.0),
                )
                for name, node in zip(names, alive, strict=True)
            ],
            time.monotonic(),
        )


def _address(said: str) -> str:
    """auto, or the host:port of a cluster that answers. Raises UserError for anything else: Ray takes `local` for an order to start
    one, and tries for minutes to reach what is not there."""
    address = os.environ.get("RAY_ADDRESS", "").strip() or said if said == "auto" else said
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(
            f"This is no address of a Ray cluster: {address!r}",
            where="execution.ray_address" if address == said else "RAY_ADDRESS",
            fix="Give host:port of the head, or auto on a node of the cluster. The run starts on a node (ray:// will not do), since it"
            " commits to the run directory.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error
    if host in ("127.0.0.1", "localhost") and not _answers_outside(int(port)):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
            "0"  # or Ray looks for it at this machine's outer address, for minutes
        )
    return address


def _answers_outside(port: int) -> bool:
    """Whether a cluster at a loopback address is one at this machine's outer address too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route, suppress(OSError):
        route.connect(("192.0.2.1", 9))  # sends nothing: which address would be used
        socket.create_connection((route.getsockname()[0], port), _CONNECT_SECONDS).close()
        return True
    return False


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        f"No Ray cluster answers: {why}",
        where=f"execution.ray_address: {address}",
        fix="Start one first (`ray start --head`, docs/scale.md): the pipeline never starts a cluster.",
    )


def _not_connected(address: str, error: Exception) -> UserError:
    """Of another Ray or Python (to the patch), Ray tells both, a line each."""
    told = re.findall(r"^ *(?:Ray|Python): (\S+)$", str(error), re.MULTILINE)
    if not str(error).startswith("Version mismatch") or len(told) != 4:
        return _no_cluster(address, first_line(error))
    return UserError(
        "The Ray cluster has Ray {} and Python {}, this process Ray {} and Python {}".format(*told),
        where=f"execution.ray_address: {address}",
        fix="Use the same versions on every node and here.",
    )


def _connected(address: str) -> Any:
    """The module ray, connected. Our signals stay ours."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.util.scheduling_strategies

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ours = {number: signal.getsignal(number) for number in numbers}
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise _not_connected(address, error) from error
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    return ray
