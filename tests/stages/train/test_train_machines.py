"""The train stage over two "machines" (gloo, CPU): this process leads, another one hosts, and they meet at an address of the network where
there is one. The result is that of one process; a machine that is lost, silent or unlike ends all in words.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from schemas.errors import UserError
from stages.children import start_child
from stages.contract import Context, Machine, MachineLost, Stopped
from stages.train.gang import run_together
from stages.train.host import serve
from stages.train.processes import any_of, local_size, world_size
from tests.stages.train.test_train_processes import LOSS, PAIRS, SETTINGS, agree, train, weights

KEY = b"of this test"


def outer_address() -> str:
    """An address of this computer that is not the loopback one, if it has any."""
    found = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")


def host(connection: Connection) -> None:
    listener = Listener(("", 0), authkey=KEY)
    connection.send(listener.address[1])
    serve(listener, lambda work: work)


@pytest.fixture(scope="module")
def far() -> Iterator[tuple[Machine, int]]:
    """The other machine, and its host's process id."""
    child = start_child(host, (), "host", leads=True)
    yield Machine("far", (outer_address(), child.receive()), KEY), child.pid or 0
    child.kill()


@pytest.fixture
def machine(far: tuple[Machine, int]) -> Machine:
    return far[0]


@pytest.fixture
def bench(workbench: Any, tmp_path: Path, tiny_folder: Path) -> Any:
    return type(workbench)(tmp_path / "seven", tiny_folder, PAIRS)


def over_two(bench: Any, machine: Machine, name: str = "two", **settings: Any) -> Context:
    return replace(bench.context(name, nodes=2, **settings), machines=(machine,))


def test_weights_cut_within_each_of_two_machines_end_as_in_one_process(bench: Any, machine: Machine) -> None:
    settings = SETTINGS | {
        "method": "full",
        "epochs": 1,
        "optimizer": "anchor",
        "merge": {"alpha": 0.1, "log_every": 1},
    }
    one, two = bench.context("one", **settings), over_two(bench, machine, processes=2, **settings)
    for context in (one, two):
        context.models |= {"sft": bench.model}
    metrics, account = train(one)
    again, again_account = train(two)
    assert again["loss"] == pytest.approx(metrics["loss"], abs=LOSS)
    assert again["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)
    agree(two, one)
    assert again_account.tallies == account.tallies and two.progress.done == 2
    rows = two.folder / "checkpoints" / "checkpoint-2" / "weights"  # type: ignore[operator]
    held = sum(tensor.numel() for file in rows.iterdir() for tensor in load_file(file).values())
    assert held == sum(tensor.numel() for tensor in weights(two).values()), "what machines hold alike is written once"


ALLO = {
    "mask": "warmup",
    "warmup_steps": 1,
    "forget_ratio": 0.5,
    "learn_ratio": 0.5,
    "token_reward": "implicit",
    "forget_max_steps": 2,
}


def test_objectives_in_sequence_through_allos_phases_over_two_machines_end_as_in_one_process(
    bench: Any, machine: Machine
) -> None:
    objectives = [{"name": code, "where": f"language = '{code}'"} for code in ("en", "de")]
    settings = SETTINGS | {
        "method": "full",
        "batch_size": 2,
        "max_steps": 2,
        "allo": ALLO,
        "orthalign": {"objectives": objectives},
    }
    del settings["epochs"]
    one, two = bench.context("one", **settings), over_two(bench, machine, **settings)
    metrics, account = train(one)
    again, again_account = train(two)
    assert again.keys() == metrics.keys()
    for name in ("loss", "allo/forget/loss", "objective/en/reward_accuracy"):
        assert again[name] == pytest.approx(metrics[name], abs=LOSS), name
    agree(two, one)
    assert again_account.tallies == account.tallies


def facts(ctx: Context) -> tuple[int, int, int, str]:
    total = torch.tensor(1)
    dist.all_reduce(total)
    return world_size(), local_size(), int(total), os.environ["GLOO_SOCKET_IFNAME"]


def waits_to_be_stopped(ctx: Context) -> None:
    while not any_of(ctx.stop()):
        time.sleep(0.05)
    raise Stopped


def breaks_far_away(ctx: Context) -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("far")
    any_of(False)


def falls_silent(ctx: Context) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    any_of(False)


def test_machines_with_different_numbers_of_processes_are_refused(bench: Any, machine: Machine) -> None:
    with pytest.raises(UserError, match="would train with 1 processes, the first machine with 2"):
        run_together(facts, over_two(bench, machine), 2)


def test_a_machine_takes_part_in_one_training_after_another_and_whatever_ends_it_is_said(
    bench: Any, far: tuple[Machine, int]
) -> None:
    machine, pid = far
    execution = {"execution": {"deterministic": True, "peer_minutes": 0.05}}
    ctx = over_two(bench, machine, sections=execution)
    Client(machine.address).close()  # one that does not know the key is not spoken to
    world, local, total, interface = run_together(facts, ctx, 1)
    assert (world, local, total) == (2, 1, 2)
    assert any(a.address == machine.address[0] for a in psutil.net_if_addrs()[interface])

    asked = threading.Event()
    threading.Timer(0.5, asked.set).start()
    with pytest.raises(Stopped):
        run_together(waits_to_be_stopped, replace(ctx, stop=asked.is_set), 1)
    with pytest.raises(RuntimeError, match=r"process 1 of the 2 .* on far: ZeroDivisionError"):
        run_together(breaks_far_away, ctx, 1)
    with pytest.raises(UserError, match=r"waited 0\.05 minutes for") as silent:
        run_together(falls_silent, ctx, 1)
    assert "continues" in silent.value.fix

    threading.Timer(1.0, lambda: os.kill(pid, signal.SIGKILL)).start()
    with pytest.raises(MachineLost, match=r"process 1 of the 2 .* on far died by the loss of its machine far"):
        run_together(waits_to_be_stopped, ctx, 1)
    with pytest.raises(UserError, match="Machine far does not answer at") as gone:
        run_together(facts, ctx, 1)
    assert gone.value.where == "train.nodes"
