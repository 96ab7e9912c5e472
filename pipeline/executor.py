"""The local executor: worker processes on this machine, one per GPU or N on the CPU.

The shard is the unit of work and of retry. A worker that dies (out of memory, a crash in native code) is replaced and
its unfinished shards go back to the queue; a stage whose workers keep dying without finishing anything ends the run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from pipeline import worker
from pipeline.executor_errors import Interrupted, StageFailed
from pipeline.rundir import RunDir
from pipeline.signals import StopSignals
from pipeline.worker import Order
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import PartManifest

_MAX_DEATHS = 3
_CLOSE_SECONDS = 10.0


@dataclass
class Reports:
    """What the executor tells the run loop. tick: called at least every second; may raise to end the run."""

    total: Callable[[int, str], None]
    advance: Callable[[int, Mapping[str, float]], None]
    note: Callable[[str], None]
    started: Callable[[int], None]
    committed: Callable[[PartManifest], None]
    tick: Callable[[], None]


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    log: Path
    slot: int
    holds: set[int] = field(default_factory=set)
    busy: bool = False
    heard: float = 0.0


class LocalExecutor:
    """Runs orders on worker processes; keeps them between orders that share an engine."""

    def __init__(self, config: RunConfig, logs: Path, signals: StopSignals) -> None:
        self._config, self._logs, self._signals = config, logs, signals
        self._context = get_context("spawn")
        # One byte without a lock: a worker killed while it held an Event's lock would hang the driver and the others.
        self._stop = self._context.RawValue("b", 0)
        self._workers: list[_Worker] = []
        self._key: str | None = None
        self._limits: dict[str, int] = {}
        self._started = 0
        self._sharing = 1
        self._devices = visible_gpus() if config.execution.device != "cpu" else []
        if config.execution.device == "cuda" and not self._devices:
            raise UserError(
                "execution.device is cuda, but no GPU is visible", fix="Use execution.device: cpu, or check nvidia-smi."
            )

    def run(self, order: Order, key: str | None, reports: Reports) -> None:
        """Carry out an order; every committed part is reported. key: orders with equal keys share loaded engines.

        Raises UserError, StageFailed or Interrupted.
        """
        with self._signals.deferred():
            self._run(order, key, reports)
            self._signals.raise_if_asked()

    def _run(self, order: Order, key: str | None, reports: Reports) -> None:
        if key is None or key != self._key:
            self.close()
        self._key = key
        queue = deque(sorted(order.shards))
        self._sharing = wanted = min(self._count(order), len(queue)) if order.spec.kind == "shard" else 1
        while len(self._workers) < wanted:
            self._workers.append(self._start(order))
        for member in self._workers[:wanted]:
            self._give(member, order, reports)
        self._attend(order, queue, reports)

    def close(self) -> None:
        """End all workers."""
        for member in self._workers:
            if member.process.is_alive() and not member.busy:
                try:
                    member.connection.send(None)
                except OSError:
                    continue
        deadline = time.monotonic() + _CLOSE_SECONDS
        for member in self._workers:
            if not member.busy:
                member.process.join(max(0.0, deadline - time.monotonic()))
            self._kill(member)
        self._workers, self._key = [], None

    def _attend(self, order: Order, queue: deque[int], reports: Reports) -> None:
        deaths, asked_to_stop = 0, 0.0
        while busy := [m for m in self._workers if m.busy]:
            reports.tick()
            if self._signals.asked:
                if not asked_to_stop:
                    asked_to_stop = time.monotonic()
                    self._stop.value = 1
                    reports.note(
                        f"{signal.Signals(self._signals.asked).name}: stopping at the next safe point, in "
                        f"{self._config.execution.grace_seconds:.0f} s at the latest; once more to stop now"
                    )
                if time.monotonic() - asked_to_stop > self._config.execution.grace_seconds:
                    raise Interrupted(self._signals.asked)
            ready = wait([*(m.connection for m in busy), *(m.process.sentinel for m in busy)], timeout=0.5)
            for member in busy:
                if member.connection in ready:
                    try:
                        while member.busy and member.connection.poll():
                            deaths = self._hear(member, order, queue, reports, deaths)
                    except (EOFError, OSError):  # its end of the pipe is closed, perhaps in the middle of a message
                        deaths = self._died(member, order, queue, reports, deaths)
                elif member.process.sentinel in ready:
                    deaths = self._died(member, order, queue, reports, deaths)
                elif cause := self._hangs(member):
                    self._kill(member)
                    deaths = self._died(member, order, queue, reports, deaths, cause)

    def _hear(self, member: _Worker, order: Order, queue: deque[int], reports: Reports, deaths: int) -> int:
        message = member.connection.recv()
        if message[0] in ("want", "committed", "total") or (message[0] == "progress" and message[1]):
            member.heard = time.monotonic()
        match message[0]:
            case "want":
                index = queue.popleft() if queue and not self._signals.asked else None
                if index is not None:
                    member.holds.add(index)
                    reports.started(index)
                self._send(member, index)
            case "committed":
                member.holds.discard(message[1].index)
                reports.committed(message[1])
                return 0
            case "progress":
                reports.advance(message[1], message[2])
            case "total":
                reports.total(message[1], message[2])
            case "note":
                reports.note(message[1])
            case "limits":
                self._limits.update(message[1])
            case "done":
                member.busy = False
                if member.holds and not self._signals.asked:
                    raise StageFailed(
                        order.spec.name, f"shards {sorted(member.holds)} were taken but not returned", "", member.log
                    )
            case "error":
                member.busy = False
                if message[1] == "user":
                    raise message[2]
                raise StageFailed(order.spec.name, message[2], message[3], member.log)
        return deaths

    def _hangs(self, member: _Worker) -> str:
        """Why the worker is taken to hang; empty if it is not."""
        minutes = self._config.execution.watchdog_minutes
        if not minutes or time.monotonic() - member.heard <= 60 * minutes:
            return ""
        return f"the watchdog after {minutes:g} minutes without any progress (execution.watchdog_minutes)"

    def _died(
        self, member: _Worker, order: Order, queue: deque[int], reports: Reports, deaths: int, cause: str = ""
    ) -> int:
        """Replace a dead worker; its unfinished shards go back to the queue.

        What it committed before it could say so counts. cause: why it was killed, if it was killed on purpose.
        """
        member.process.join()
        code = member.process.exitcode
        if not cause:
            cause = f"signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"exit code {code}"
            if code == -signal.SIGKILL:
                cause += ", most often the system was out of memory"
        member.busy = False
        self._kill(member)
        self._workers.remove(member)
        deaths += 1
        committed = RunDir(order.root).parts(order.spec, order.round, order.fingerprint)
        for index in sorted(member.holds & set(committed)):
            member.holds.discard(index)
            reports.committed(committed[index])
            deaths = 0
        if self._signals.asked or (order.spec.kind != "shard" and not member.holds):
            return deaths
        if deaths >= _MAX_DEATHS:
            raise UserError(
                f"{order.spec.name}: {deaths} worker processes died one after another without finishing a shard; "
                f"the last by {cause}",
                where=str(member.log),
                fix="Look at the end of that log; fewer execution.workers or smaller batches need less memory. "
                "Nothing that was finished is lost: the same command continues.",
            )
        reports.note(f"a worker died ({cause}); starting another")
        if order.spec.kind == "shard":
            queue.extendleft(sorted(member.holds, reverse=True))
        replacement = self._start(order)
        self._workers.append(replacement)
        self._give(replacement, order, reports)
        return deaths

    def _give(self, member: _Worker, order: Order, reports: Reports) -> None:
        """Send an order. A stage that is not cut into shards holds its one part from the start."""
        member.busy, member.holds, member.heard = True, set(), time.monotonic()
        if order.spec.kind != "shard":
            member.holds = set(order.shards)
            for index in order.shards:
                reports.started(index)
        self._send(member, replace(order, limits=dict(self._limits)))

    def _count(self, order: Order) -> int:
        configured = self._config.execution.workers
        if not self._devices:
            return configured or 1
        return configured or max(1, len(self._devices) // self._width(order))

    def _send(self, member: _Worker, message: Order | int | None) -> None:
        try:
            member.connection.send(message)
        except BrokenPipeError:
            return

    def _start(self, order: Order) -> _Worker:
        slot = min(set(range(len(self._workers) + 1)) - {member.slot for member in self._workers})  # of one that died
        ours, theirs = self._context.Pipe()
        log = self._logs / f"worker-{self._started:03d}.log"
        self._started += 1
        environment = self._environment(slot, self._width(order))
        process = self._context.Process(
            target=worker.main, args=(theirs, os.getpid(), log, environment, self._stop), name=f"congrad-worker-{slot}"
        )
        saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            process.start()
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        theirs.close()
        return _Worker(process, ours, log, slot)

    def _width(self, order: Order) -> int:
        """GPUs that a worker sees."""
        return order.spec.gpus_per_worker(self._config, len(self._devices))

    def _environment(self, slot: int, width: int) -> dict[str, str]:
        """Set before the process starts, since native libraries read it when they load."""
        threads = self._config.execution.threads or max(1, len(os.sched_getaffinity(0)) // self._sharing)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "POLARS_MAX_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONFAULTHANDLER": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self._devices:
            first = slot * width % len(self._devices)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices[first : first + width])
        elif self._config.execution.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment

    def _kill(self, member: _Worker) -> None:
        """End the worker and whatever it started: it leads a process group of its own."""
        if member.process.pid is not None:
            try:
                os.killpg(member.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                member.process.kill()
        member.process.join()
        member.connection.close()


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use, without loading CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device.strip() and device.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(n) for n in range(sum(line.startswith("GPU ") for line in found.stdout.splitlines()))]
