"""A real Ray cluster on this machine: a head without cores and nodes with one each, on the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

_MEMORY = 80_000_000
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
"""A node that says nothing for some seconds is lost; Ray's own limit is about half a minute."""


class ThreeNodes:
    """`nodes` are the ones with a core each. `address` of the head."""

    def __init__(self, names: tuple[str, ...] = ("a", "b")) -> None:
        self._names = names
        self._start()

    def _start(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's word for: stay on the loopback interface
        os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112
        os.environ["RAY_TMPDIR"] = self._temporary.name
        here = Path(__file__).parent
        os.environ["PYTHONPATH"] = f"{here.parent}:{here / 'pipeline'}"
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "node_ip_address": "127.0.0.1",
                "object_store_memory": _MEMORY,
                "_system_config": _HEALTH,
            },
        )
        self.address = self.cluster.address
        self.nodes: dict[str, object] = {}
        for name in self._names:
            self.add(name)

    def lose_head(self) -> None:
        """As if its machine were lost."""
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def renew(self) -> None:
        """Another cluster in the place of this one."""
        self.close()
        self._start()

    def add(self, name: str) -> object:
        """Another node with one core."""
        self.nodes[name] = self.cluster.add_node(
            num_cpus=1, node_name=f"node-{name}", object_store_memory=_MEMORY, wait=False
        )
        return self.nodes[name]

    def processes(self, name: str) -> list[psutil.Process]:
        """The node's raylet and everything it started, workers first."""
        node = self.nodes[name]
        raylets = [info[0].process for key, info in node.all_processes.items() if key == "raylet"]
        found = [psutil.Process(raylet.pid) for raylet in raylets]
        return [child for each in found for child in reversed(each.children(recursive=True))] + found

    def strike(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to all of a node at once, as a machine that is lost (SIGKILL) or hangs (SIGSTOP)."""
        for process in reversed(self.processes(name)):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def close(self) -> None:
        """End all."""
        for name in self.nodes:
            self.strike(name)
        self.cluster.shutdown()
        self._temporary.cleanup()


def start_driver(config: Path, *overrides: str, more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The command line on fake stages, a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "faults" / "fake_main.py"), "run", str(config), "--quiet"]
    sets = [word for override in overrides for word in ("--set", override)]
    return subprocess.Popen(
        [*command, *sets, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_until(condition, seconds: float = 150.0) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


def free_port() -> int:
    """A port on which nothing answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
