"""The same command on several machines, started by torchrun, srun or Kubernetes: the first one runs it, the others offer seats to its trainings.

The launcher says who is who by torchrun's variables, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, with one process a machine. They meet in
torch's store at that address (torchrun's own where it has one); the first machine starts processes of the training on all of them.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.console import Display
from pipeline.executor_errors import Interrupted, ending
from pipeline.machine import new_key, offering
from pipeline.probe import Look, look, probe_in, refuse_others
from pipeline.signals import StopSignals
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Machine

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
"""Of other variables of launchers: a library in a stage of one process would take them for its own."""
_PORTS = 1 << 16
_LEAVE_SECONDS = 10.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Launch:
    """This machine among those that a launcher started the command on."""

    rank: int
    count: int


def launch_of(config: RunConfig) -> Launch | None:
    """None where the command was started alone, or trains on one machine. Raises UserError for a launch that does not fit the config."""
    nodes = config.train.nodes
    if nodes == 1 or config.execution.on != "local" or "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if missing or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UserError(
            f"The launcher's variables {', '.join(missing) or 'RANK, WORLD_SIZE and MASTER_PORT'} are missing or no numbers",
            where="train.nodes",
            fix="docs/scale.md has scripts for Slurm and Kubernetes.",
        )
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(
            f"The launcher started {os.environ['LOCAL_WORLD_SIZE']} processes a machine",
            where="train.nodes",
            fix="Start one a machine (torchrun --nproc-per-node 1, srun --ntasks-per-node=1): it starts train.processes of its own.",
        )
    rank, count, port = map(int, numbers)
    if rank >= count or not 0 < port < _PORTS:
        raise UserError(
            f"The launcher's variables do not fit: RANK={rank}, WORLD_SIZE={count}, MASTER_PORT={port}",
            where="train.nodes",
            fix="RANK counts from 0 to WORLD_SIZE - 1, and a port is at most 65535. docs/scale.md has scripts for Slurm and Kubernetes.",
        )
    if nodes not in (0, count):
        raise UserError(
            f"train.nodes is {nodes} and the launcher started {count} machine(s)",
            where="train.nodes",
            fix="Set it to 0, which takes those that are started.",
        )
    return Launch(rank, count) if count > 1 else None


@contextmanager
def gathered(
    config: RunConfig, launch: Launch | None, display: Display
) -> Iterator[Callable[[Path], tuple[Machine, ...]]]:
    """What says who the other machines are, once they have read a folder (`Muster.machines`): there are none without a launch."""
    if launch is None:
        yield lambda root: ()
        return
    with Muster(config, launch, display) as muster:
        yield muster.machines


class Muster:
    """The first machine's end: who the others are, and that the run ended. Raises UserError when they are not there within
    `execution.peer_minutes`."""

    def __init__(self, config: RunConfig, launch: Launch, display: Display) -> None:
        self._count, self._limit = launch.count, _limit(config)
        with display.busy(f"waiting for {launch.count - 1} other machine(s)"):
            self._store = _met(self._limit)

    def machines(self, root: Path) -> tuple[Machine, ...]:
        """The others, each of which reads `root` and runs our versions. Raises UserError for one that does not."""
        with probe_in(root) as (probe, expected):
            self._store.set("probe", str(probe.resolve()))
            said = [self._said(rank) for rank in range(1, self._count)]
            mine = look(probe)
        names = [entry["name"] for entry in said]
        found, machines = {}, []
        for rank, entry in enumerate(said, 1):
            name = entry["name"] if names.count(entry["name"]) == 1 else f"{entry['name']}-{rank}"
            found[name] = Look(**entry["look"])
            machines.append(Machine(name, (entry["address"], entry["port"]), bytes.fromhex(entry["key"])))
        refuse_others(found, mine, expected, root)
        return tuple(machines)

    def __enter__(self) -> Muster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The others end as we do; the store is ours, so that they are waited for."""
        try:
            self._store.set("ended", str(0 if error is None else ending(error)["exit_code"]))
            deadline = time.monotonic() + _LEAVE_SECONDS
            while self._store.add("left", 0) < self._count - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:
            pass  # a launcher's store that went away: so will they

    def _said(self, rank: int) -> dict[str, Any]:
        try:
            self._store.wait([f"machine/{rank}"], self._limit)
        except RuntimeError as error:
            raise UserError(
                f"Machine {rank} of the {self._count} that the launcher started says nothing",
                where="train.nodes",
                fix="Look at its output; the same command continues.",
            ) from error
        said: dict[str, Any] = json.loads(self._store.get(f"machine/{rank}"))
        return said


def follow(config: RunConfig, launch: Launch, display: Display) -> None:
    """What the other machines do: offer seats until the run ends. Raises UserError or Interrupted when it ended so, or answers no more."""
    leader = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with StopSignals() as signals:
        with display.busy("waiting for the first machine"):
            store = _met(_limit(config))
        with closing(socket.create_connection(leader)) as route:
            address = route.getsockname()[0]
        key = new_key()
        listener, serve = offering(key)
        threading.Thread(target=serve, name="seats", daemon=True).start()
        mine = {"name": socket.gethostname(), "address": address, "port": listener.address[1], "key": key.hex()}
        display.say(f"machine {launch.rank} of {launch.count}: offers seats to the training of the first one")
        try:
            with signals.deferred():
                code = _until_ended(store, launch.rank, mine, signals, config.execution.grace_seconds)
        except RuntimeError as error:
            raise UserError(
                "The first machine no longer answers",
                where=f"MASTER_ADDR {leader[0]}",
                fix="Look at its output; the same command continues from the last checkpoint.",
            ) from error
    if code > 128:
        raise Interrupted(code - 128)
    if code:
        raise UserError(f"The run ended on the first machine with exit code {code}", fix="Its output says why.")


def _until_ended(store: Any, rank: int, mine: dict[str, Any], signals: StopSignals, grace: float) -> int:
    """The exit code of the run. When asked to stop: so was the first machine, which lets its training reach a safe point."""
    told, asked_at = False, 0.0
    while not store.check(["ended"]):
        if not told and store.check(["probe"]):
            told, probe = True, Path(store.get("probe").decode())
            store.set(f"machine/{rank}", json.dumps(mine | {"look": asdict(look(probe))}))
        if signals.asked and not asked_at:
            asked_at = time.monotonic()
        if asked_at and time.monotonic() - asked_at > grace + _LEAVE_SECONDS:
            raise Interrupted(signals.asked)
        time.sleep(_POLL_SECONDS)
    code = int(store.get("ended"))
    store.add("left", 1)
    return code


def _limit(config: RunConfig) -> timedelta:
    return timedelta(minutes=config.execution.peer_minutes)


def _met(limit: timedelta) -> Any:
    """The store, once all machines are there. Takes the launcher's variables out of the environment: stages are not its processes."""
    from stages.train.peers import launched_store  # imports torch

    try:
        store = launched_store(limit)
    except RuntimeError as error:
        raise UserError(
            f"The machines that the launcher started did not meet: {str(error).splitlines()[0]}",
            where=f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}",
            fix="The first machine must be reachable there from all others, within execution.peer_minutes.",
        ) from error
    for name in [name for name in os.environ if name in _VARIABLES or name.startswith(_PREFIXES)]:
        del os.environ[name]
    return store
