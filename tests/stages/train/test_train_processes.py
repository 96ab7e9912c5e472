"""The train stage in two processes (gloo, CPU): the result of one, resume, stopping, a process that dies.

Losses and weights agree to rounding, not bit for bit: a gradient is the mean over processes of means, and Adam magnifies the
rounding of gradients near 0. Seven pairs in steps of four with two a process: an epoch's last step has three, so that one process
has a pair less.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.storage import storage_error
from schemas.errors import UserError
from stages.contract import Account, Context, Rows, Stopped
from stages.train import gang
from stages.train.batches import plan_batches
from stages.train.gang import run_together
from stages.train.peers import peer_limit, silence_named
from stages.train.processes import any_of, from_first
from stages.train.sharding import unsharded
from stages.train.stage import Train

PAIRS = 7
SETTINGS: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 1, "epochs": 2, "learning_rate": 1e-3}
LOSS, WEIGHT = 2e-4, 2e-5  # the learning rate is 1e-3: a weight is right to a fiftieth of one step


@pytest.fixture
def bench(workbench: Any, tmp_path: Path, tiny_folder: Path) -> Any:
    return type(workbench)(tmp_path / "seven", tiny_folder, PAIRS)


@pytest.fixture
def in_half(workbench: Any, tmp_path: Path, tiny_folder: Path) -> Any:
    """The same on a model whose files are bfloat16: what is cut over processes is mapped from them."""
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(folder)
    workbench.renderer.tokenizer.save_pretrained(folder)
    return type(workbench)(tmp_path / "seven", folder, PAIRS)


def train(ctx: Context) -> tuple[dict[str, list[float]], Account]:
    rows, account = list(Train().run(ctx))
    assert isinstance(rows, Rows) and isinstance(account, Account)
    return by_name(rows.data), account


def by_name(metrics: pa.Table) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in metrics.to_pylist():
        found.setdefault(row["name"], []).append(row["value"])
    return found


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / "model" / "model.safetensors")


def agree(a: Context, b: Context) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=WEIGHT)


def test_weights_cut_over_two_processes_end_as_in_one_and_a_stopped_run_ends_so_bit_for_bit(in_half: Any) -> None:
    bench = in_half
    settings = SETTINGS | {
        "method": "full",
        "optimizer": "anchor",
        "merge": {"alpha": 0.1, "log_every": 1},
        "micro_batch_size": 2,
    }
    one = bench.context("one", **settings)
    one.models |= {"sft": bench.model}
    metrics, account = train(one)

    two = bench.context("two", processes=2, gradient_checkpointing=True, **settings)
    two.models |= {"sft": bench.model}
    again, again_account = train(two)
    assert again["loss"] == pytest.approx(metrics["loss"], abs=LOSS)
    assert again["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)
    assert again["merge/delta_norm"] == pytest.approx(metrics["merge/delta_norm"], rel=1e-3)
    agree(two, one)
    assert again_account.tallies == account.tallies
    assert [p.name for p in again_account.artifacts] == [p.name for p in account.artifacts]
    assert two.progress.units == one.progress.units == [(4, "step")] and two.progress.done == 4

    stopped = bench.context("stopped", stop_at=2, processes=2, gradient_checkpointing=True, **settings)
    stopped.models |= {"sft": bench.model}
    with pytest.raises(Stopped):
        train(stopped)
    assert stopped.folder is not None
    checkpoint = next((stopped.folder / "checkpoints").glob("checkpoint-*"))
    step = int(checkpoint.name.partition("-")[2])
    assert step < 4 and by_rows(checkpoint)
    for processes in (2, 1):
        resumed = bench.context("stopped", processes=processes, gradient_checkpointing=True, **settings)
        resumed.models |= {"sft": bench.model}
        if processes == 1:  # the two are done: continue from where they were stopped
            for folder in (stopped.folder / "checkpoints").glob("checkpoint-4"):
                folder.rename(stopped.folder / "ended")
        train(resumed)
        assert f"resuming from checkpoint-{step}" in resumed.progress.notes
        if processes == 2:
            assert all(torch.equal(w, weights(two)[n]) for n, w in weights(resumed).items())
        else:
            agree(resumed, one)
    last = weights(resumed)
    shutil.rmtree(stopped.folder / "model")
    assert not by_rows(stopped.folder / "checkpoints" / "checkpoint-4")  # the one process wrote it whole: two cut it
    again_two = bench.context("stopped", processes=2, **settings)
    again_two.models |= {"sft": bench.model}
    train(again_two)
    assert "resuming from checkpoint-4" in again_two.progress.notes
    assert all(torch.equal(weight, last[name]) for name, weight in weights(again_two).items())
    assert not list((stopped.folder / "checkpoints").glob("*.safetensors"))


def by_rows(checkpoint: Path) -> bool:
    """Whether each of two processes wrote its half of the weights and of the optimizer's state, and nobody more."""
    halves = [sum(p.stat().st_size for p in checkpoint.rglob(f"shard-0000{rank}-*")) for rank in (1, 2)]
    small = sum(p.stat().st_size for p in checkpoint.glob("optimizer.pt"))
    return 0.8 < (halves[1] + 1) / (halves[0] + 1) < 1.25 and small < halves[0] / 4


def test_lora_in_two_processes_ends_as_in_one(bench: Any) -> None:
    one, two = bench.context("one", **SETTINGS), bench.context("two", processes=2, **SETTINGS)
    metrics, _ = train(one)
    again, _ = train(two)
    assert again["loss"] == pytest.approx(metrics["loss"], abs=LOSS)
    agree(two, one)
    assert (two.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_when_a_process_dies_all_end_and_the_error_says_which(bench: Any) -> None:
    ctx = bench.context(processes=2, **SETTINGS | {"epochs": 500})
    before = set(multiprocessing.active_children())
    killed: list[int] = []

    def kill() -> None:
        while not ctx.progress.done:
            time.sleep(0.05)
        victim = next(p for p in set(multiprocessing.active_children()) - before if p.name == "congrad-train-1")
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(
        UserError, match=r"process 1 of the 2 that train together died by signal 9 \(SIGKILL\)"
    ) as error:
        train(ctx)
    thread.join()
    assert killed and "\n" not in str(error.value)
    assert set(multiprocessing.active_children()) <= before


def stops_in_the_first(ctx: Context) -> None:
    def compute() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        from_first(compute, ctx.config)


def runs_out_of_memory_in_the_second(ctx: Context) -> None:
    stops_in_the_first(ctx)  # and so in both
    if dist.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    any_of(False)  # breaks when the other is gone


def test_a_stop_in_the_first_is_one_in_all_and_the_first_that_breaks_is_the_cause(bench: Any) -> None:
    with pytest.raises(UserError, match=r"process 1 of the 2 .* ran out of memory: CUDA out of memory") as error:
        run_together(runs_out_of_memory_in_the_second, bench.context(), 2)
    assert "train.micro_batch_size" in error.value.fix


def finds_the_disk_full_in_the_second(ctx: Context) -> None:
    if dist.get_rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/checkpoint-1/a")
    any_of(False)


def test_a_full_disk_of_one_process_is_said_in_the_systems_words(bench: Any) -> None:
    with pytest.raises(RuntimeError, match="process 1 of the 2") as error:
        run_together(finds_the_disk_full_in_the_second, bench.context(), 2)
    said = storage_error(error.value, bench.root)
    assert said is not None and said.what == "The disk is full" and said.where == "/scratch/checkpoint-1/a"


def computes_for_longer_than_the_limit(ctx: Context) -> float:
    def compute() -> float:
        time.sleep(3)
        return 1.5

    return from_first(compute, ctx.config)


def freezes(ctx: Context) -> None:
    def compute() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    from_first(compute, ctx.config)


def waits_in_a_collective(ctx: Context) -> None:
    with silence_named(peer_limit(ctx.config)):
        if dist.get_rank() == 1:
            time.sleep(60)
        any_of(True)


def test_a_silent_process_ends_all_within_the_limit_and_one_that_computes_does_not(bench: Any) -> None:
    ctx = bench.context(processes=2, sections={"execution": {"deterministic": True, "peer_minutes": 0.02}})
    assert run_together(computes_for_longer_than_the_limit, ctx, 2) == 1.5
    for job in (freezes, waits_in_a_collective):
        with pytest.raises(UserError, match=r"waited 0\.02 minutes for") as error:
            run_together(job, ctx, 2)
        assert error.value.where == "execution.peer_minutes" and "continues" in error.value.fix


def test_what_one_process_refuses_is_the_error_of_all(bench: Any) -> None:
    ctx = bench.context(processes=2, **SETTINGS | {"batch_size": 3})
    with pytest.raises(UserError, match="not a multiple"):
        train(ctx)


@pytest.mark.parametrize("sharding", ["fsdp2", "hsdp"])
def test_between_objectives_and_phases_weights_are_whole_so_that_cutting_them_is_refused(
    sharding: str, bench: Any
) -> None:
    objectives = [{"name": code, "where": f"language = '{code}'"} for code in ("en", "de")]
    for way in ({"orthalign": {"objectives": objectives}}, {"allo": {"mask": "warmup"}}):
        with pytest.raises(ValueError, match="the weights are needed whole"):
            bench.context(processes=2, method="full", sharding=sharding, **way, **SETTINGS)


def test_a_batch_smaller_than_the_processes_is_refused_and_micro_batches_are_fitted() -> None:
    from schemas.config.training import TrainConfig

    with pytest.raises(UserError, match="smaller than the 4 processes"):
        plan_batches(10, TrainConfig(batch_size=3), devices=4)
    plan = plan_batches(10, TrainConfig(batch_size=4, micro_batch_size=2), devices=4)
    assert (plan.micro_batch, plan.accumulation) == (1, 1)


def test_a_process_that_does_not_write_holds_no_whole_weights_and_the_first_maps_them(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    for file in (None, tmp_path / "whole.safetensors"):
        with torch.device("meta"):
            empty = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        found = unsharded(model, empty, torch.bfloat16, file)
        assert {p.is_meta for p in found.parameters()} == {file is None}
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(found.parameters(), model.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def test_sharding_a_lora_model_is_refused(bench: Any) -> None:
    with pytest.raises(ValueError, match="use ddp or auto"):
        bench.context(sharding="fsdp2")


@pytest.mark.parametrize(
    ("death", "cuda", "where", "said"),
    [
        ("signal 6 (SIGABRT)", True, "execution.peer_minutes", "waited for another longer than allowed"),
        ("signal 6 (SIGABRT)", False, "train.processes", "needs less memory"),
        ("signal 9 (SIGKILL)", True, "train.processes", "needs less memory"),
    ],
)
def test_a_process_that_nccl_aborts_is_no_lack_of_memory(death: str, cuda: bool, where: str, said: str) -> None:
    error = gang._cause([gang._Member(0, 2), gang._Member(1, 2, death=death)], cuda)
    assert isinstance(error, UserError) and error.where == where and said in str(error)
    assert "process 1 of the 2 that train together died by" in error.what and "same command continues" in error.fix
