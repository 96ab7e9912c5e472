"""What runs on a node of a Ray cluster: a thin host of today's worker process, and a look at the node before a run uses it.

The host is an actor. It starts `pipeline.worker` as a child process and relays messages, so that a worker is the same on every
executor: its environment is set before it starts, a crash in native code does not take Ray down, and vLLM does not see that it is
inside Ray. Nothing here imports Ray.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pipeline
from pipeline import worker
from pipeline.config_digests import config_files
from pipeline.messages import Order
from schemas.errors import UserError
from schemas.files import await_whole, sha256
from schemas.manifests import FileRecord
from stages.children import Child, ChildDied, start_child, stop_flag, wait_for
from stages.contract import ModelRef
from stages.models.resolve import resolve

_HEAR_SECONDS = 10.0
_START_SECONDS = 60.0
"""For a process to start. One that has not by then is nobody to speak to; the driver misses its words and replaces the node's worker."""
_PACKAGES = ("ray", "torch", "transformers", "trl", "vllm", "polars", "pyarrow")


@dataclass(frozen=True)
class Placed:
    """To the driver's end of a member: where it is. gpus: their ids there."""

    node_id: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Died:
    """To the driver's end of a member: its process ended. cause: in words."""

    cause: str


@dataclass(frozen=True)
class Look:
    """What a node is. probe: the hash of what it read at the probe's path, or why it could not. read_mb_per_s: how fast."""

    versions: dict[str, str]
    probe: str
    read_mb_per_s: float
    cores: int
    gpus: tuple[str, ...]


class Host:
    """An actor: one worker process and the words to and from it. `hear` and `tell` are called from threads of their own."""

    def __init__(self, log: Path, folder: str, environment: Mapping[str, str]) -> None:
        with suppress(OSError):  # of a node that has no such folder; what needs it says so
            os.chdir(folder)
        self._log, self._environment = log, dict(environment)
        self._words: deque[Any] = deque([_placed()])
        self._spoken = threading.Condition()
        self._child: Child | None = None
        self._ready = threading.Event()
        self._stop = stop_flag()
        # The death signal of a parent belongs to the thread that started the child: one that stays.
        threading.Thread(target=self._relay, name="relay", daemon=True).start()

    def hear(self) -> list[Any]:
        """What was said since; waited for, but not for ever."""
        with self._spoken:
            self._spoken.wait_for(lambda: self._words, _HEAR_SECONDS)
            said = list(self._words)
            self._words.clear()
        return said

    def tell(self, message: Any) -> None:
        """Pass a message on. `hear` says that the worker died."""
        self._ready.wait(_START_SECONDS)
        if self._child is not None:
            with suppress(ChildDied):
                self._child.send(message)

    def stop(self) -> None:
        """Ask the worker to stop at its next safe point."""
        self._stop.value = 1

    def quit(self) -> None:
        """End the worker at once with all it started."""
        self._ready.wait(_START_SECONDS)
        if self._child is not None:
            self._child.kill()

    def _relay(self) -> None:
        try:
            child = start_child(
                main, (self._log, self._stop), "congrad-worker", environment=self._environment, leads=True
            )
        except OSError as error:
            self._say([Died(f"{error.strerror} when it was started")])
            self._ready.set()
            return
        self._child = child
        self._ready.set()
        while True:
            with suppress(OSError, ValueError):  # `quit` closed the pipe
                wait_for([child], _HEAR_SECONDS)
            try:
                for message in child.messages():
                    self._say([message])
            except ChildDied as death:
                self._say([Died(death.cause)])
                return

    def _say(self, words: list[Any]) -> None:
        with self._spoken:
            self._words.extend(words)
            self._spoken.notify()


def main(connection: Connection, log: Path, stop: Any) -> None:
    """Entry point of a worker process on a node."""
    worker.main(connection, log, stop, settled)


def settled(order: Order) -> Order:
    """The order as this node can carry it out: its files are seen here, its models are this node's. Raises UserError for a node
    that has other files or models than the driver."""
    here = socket.gethostname()
    inputs = [record for name in order.inputs for record in _at_once(order, name)]
    if unseen := await_whole(order.root, inputs, order.visible_seconds, thorough=False):
        raise UserError(
            f"Node {here} does not see {len(unseen)} of the run's files after {order.visible_seconds:.0f} s",
            where=str(order.root / unseen[0].path),
            fix="Every node must see the run directory at the same path.",
        )
    for name, digest in config_files(order.spec, order.config).items() if order.outside else ():
        if order.outside.get(name) != digest:
            raise UserError(
                f"The file {name} is another one on node {here} than where the run was started",
                where=f"stage {order.spec.name}",
                fix="Put it where every node sees the same file, for example beside the run directory.",
            )
    return replace(order, models={role: _own(model, order.root, here) for role, model in order.models.items()})


def look(probe: Path) -> Look:
    """What this node is and reads."""
    begun = time.monotonic()
    try:
        read = _read_when_there(probe)
        size = probe.stat().st_size
    except OSError as error:
        read, size = f"{error.strerror or error}", 0
    seconds = max(time.monotonic() - begun, 1e-6)
    return Look(_versions(), read, size / 1e6 / seconds, len(os.sched_getaffinity(0)), _placed().gpus)


def _read_when_there(probe: Path) -> str:
    deadline = time.monotonic() + 5.0
    while True:
        try:
            return sha256(probe)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _placed() -> Placed:
    import ray

    context = ray.get_runtime_context()
    return Placed(context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ())))


def _at_once(order: Order, name: str) -> list[FileRecord]:
    """Files of a table that are read in any case; of the one that shards are cut from, a shard waits for its own (`runner.read_range`)."""
    cut = order.spec.kind == "shard" and name == order.spec.reads[0].rstrip("?")
    return [] if cut else order.inputs[name]


def _own(model: ModelRef, root: Path, here: str) -> ModelRef:
    """The same model on this node. What the run trained lies in the run directory."""
    if model.path is None or model.path.resolve().is_relative_to(root.resolve()):
        return model
    try:
        found = resolve(model.name, model.revision or None)
    except UserError as error:
        raise UserError(f"On node {here}: {error.what}", where=error.where, fix=error.fix) from error
    if found.digest != model.digest:
        raise UserError(
            f"The model {model.name} is another one on node {here} than where the run was started",
            where=str(found.path),
            fix="Give all nodes the same files, or a folder that all of them see.",
        )
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "congrad": pipeline.__version__, "congrad's code": _code()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _code() -> str:
    """Hash of our own sources: two clones of one version may differ."""
    top = Path(pipeline.__file__).parent.parent
    total = hashlib.sha256()
    for package in ("pipeline", "schemas", "stages"):
        for path in sorted((top / package).rglob("*.py")):
            total.update(path.relative_to(top).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:12]
