"""Workers on this machine: processes that die with the driver, one per GPU or N on the CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline import worker
from pipeline.crew import Member, MemberDied, worker_environment
from pipeline.executor import Executor
from pipeline.local_gpus import local_gpus, width
from pipeline.messages import Order, ToDriver, ToWorker
from pipeline.pool import Pool
from pipeline.signals import StopSignals
from schemas.config import RunConfig
from stages.children import Child, ChildDied, start_child, stop_flag, wait_for
from stages.contract import Machine


class LocalMember:
    """See `pipeline.crew.Member`."""

    def __init__(self, child: Child, log: Path, place: str, machines: tuple[Machine, ...] = ()) -> None:
        self.child, self.log, self.place, self._machines = child, log, place, machines

    def send(self, message: ToWorker) -> None:
        """See Member."""
        if isinstance(message, Order) and message.spec.machines:
            message = replace(message, machines=self._machines)
        with suppress(ChildDied):
            self.child.send(message)

    def received(self) -> Iterator[ToDriver]:
        """See Member."""
        try:
            yield from self.child.messages()
        except ChildDied as death:
            raise MemberDied(death.cause) from None

    def end(self, seconds: float) -> None:
        """See Member."""
        self.child.end(seconds)

    def kill(self) -> None:
        """See Member."""
        self.child.kill()


class LocalCrew:
    """See `pipeline.crew.Crew`. machines: others that a stage may span."""

    def __init__(self, config: RunConfig, logs: Path, machines: tuple[Machine, ...] = ()) -> None:
        self._config, self._logs, self._machines = config, logs, machines
        self._stop = stop_flag()
        self._started = 0
        self._devices = local_gpus(config)

    def size(self, order: Order) -> int:
        """See Crew: what the config says, or one per GPU (or per group of them), or one on the CPU."""
        return self._config.execution.workers or max(1, len(self._devices) // self._width(order))

    def start(self, order: Order, slot: int, of: int) -> LocalMember:
        """See Crew."""
        log = self._logs / f"worker-{self._started:03d}.log"
        self._started += 1
        environment = self._environment(slot, self._width(order), of)
        name = f"congrad-worker-{slot}"
        child = start_child(worker.main, (log, self._stop), name, environment=environment, leads=True)
        gpus = f" GPU {environment['CUDA_VISIBLE_DEVICES']}" if self._devices else ""
        return LocalMember(child, log, f"{socket.gethostname()}{gpus}", self._machines)

    def wait(self, members: Sequence[Member], seconds: float) -> None:
        """See Crew."""
        wait_for([member.child for member in members if isinstance(member, LocalMember)], seconds)

    def stop(self) -> None:
        """See Crew."""
        self._stop.value = 1

    def close(self) -> None:
        """See Crew: there is nothing to leave."""

    def _width(self, order: Order) -> int:
        """GPUs that a worker sees."""
        return width(self._config, order.spec, self._devices)

    def _environment(self, slot: int, width: int, sharing: int) -> dict[str, str]:
        threads = self._config.execution.threads or max(1, len(os.sched_getaffinity(0)) // sharing)
        environment = worker_environment(threads)
        if self._devices:
            first = slot * width % len(self._devices)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices[first : first + width])
        elif self._config.execution.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment


def local_executor(config: RunConfig, logs: Path, signals: StopSignals, machines: tuple[Machine, ...] = ()) -> Executor:
    """The executor on this machine, and on others for stages that span several."""
    return Pool(LocalCrew(config, logs, machines), config.execution, signals)
