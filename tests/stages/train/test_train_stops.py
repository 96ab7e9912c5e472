"""Stopping and failing disks lose little: what is on disk then is a whole checkpoint, and the run continues from it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage import storage_error
from stages.contract import Context, Stopped
from stages.train import callbacks
from stages.train.stage import Train
from stages.train.trainer import PairTrainer

SLOW: dict[str, Any] = {"batch_size": 6, "micro_batch_size": 1, "epochs": 3, "save_steps": 100}


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    assert ctx.folder is not None
    return load_file(ctx.folder / "model" / "model.safetensors")


def same(a: Context, b: Context) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(w, theirs[n]) for n, w in ours.items())


def counted(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Micro-batches that take so long, and how many there were."""
    forwards: list[int] = []
    loss = PairTrainer.compute_loss

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        forwards.append(self.state.global_step)
        time.sleep(seconds)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", slow)
    return forwards


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stop_in_a_long_step_saves_the_step_before_and_resumes_to_the_same_bits(
    workbench: Any, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """save_steps is never reached: without a checkpoint in the middle of the step everything would be lost."""
    settings = SLOW | {"lora": {"dropout": dropout}}
    whole = workbench.context("whole", **settings)
    list(Train().run(whole))
    short = {"execution": {"deterministic": True, "grace_seconds": 0.01}}
    halted = workbench.context("halted", **settings, sections=short)
    forwards = counted(monkeypatch, 0.0)
    halted.stop = lambda: len(forwards) >= 9  # the second of three steps, its third micro-batch
    with pytest.raises(Stopped):
        list(Train().run(halted))
    assert len(forwards) == 9
    checkpoints = halted.folder / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"checkpoint-1"}
    monkeypatch.undo()
    resumed = workbench.context("halted", **settings, sections=short)
    list(Train().run(resumed))
    assert "resuming from checkpoint-1" in resumed.progress.notes
    assert same(whole, resumed)


def test_a_stop_that_leaves_time_for_the_step_waits_for_it(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = workbench.context(**SLOW)
    forwards = counted(monkeypatch, 0.0)
    ctx.stop = lambda: len(forwards) >= 9
    with pytest.raises(Stopped):
        list(Train().run(ctx))
    assert len(forwards) == 12 and {p.name for p in (ctx.folder / "checkpoints").iterdir()} == {"checkpoint-2"}


def test_a_stop_in_the_first_step_ends_without_a_checkpoint(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = workbench.context(**SLOW, sections={"execution": {"deterministic": True, "grace_seconds": 0.01}})
    forwards = counted(monkeypatch, 0.0)
    ctx.stop = lambda: len(forwards) >= 2
    with pytest.raises(Stopped):
        list(Train().run(ctx))
    assert len(forwards) == 2 and not list((ctx.folder / "checkpoints").glob("checkpoint-*"))


def test_there_is_news_of_a_step_before_it_ends(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "_NEWS_SECONDS", 0.0)
    ctx = workbench.context(**SLOW | {"epochs": 1})
    list(Train().run(ctx))
    told = [rates["micro_batches"] for rates in ctx.progress.rates if "micro_batches" in rates]
    assert told == [1, 2, 3, 4, 5] and ctx.progress.done == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Real writes fail in this process, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes(folder: Path, pattern: str) -> int:
    return max(p.stat().st_size for p in folder.glob(pattern))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "export"])
def test_a_disk_that_fills_up_is_said_in_words_and_the_run_continues(workbench: Any, file: str) -> None:
    """Each kind of file a training writes is the one that does not fit: safetensors', torch's, Python's own."""
    small = {"lora": {"r": 1, "target_modules": ["q_proj"]}}  # its checkpoints are smaller than the merged model
    settings: dict[str, Any] = {"save_steps": 2, "epochs": 2} | (small if file == "export" else {"method": "full"})
    whole = workbench.context("whole", **settings)
    list(Train().run(whole))
    first = whole.folder / "checkpoints" / "checkpoint-6"
    limit = {
        "model.safetensors": lambda: sizes(first, "model.safetensors") - 1,
        "optimizer.pt": lambda: sizes(first, "optimizer.pt") - 1,
        "trainer_state.json": lambda: 1024,
        "export": lambda: sizes(whole.folder / "model", "*.safetensors") - 1,
    }[file]()
    full = workbench.context("full", **settings)
    with largest_file(limit), pytest.raises(Exception) as error:
        list(Train().run(full))
    said = storage_error(error.value, full.folder)
    assert said is not None, repr(error.value)
    assert "size limit" in said.what and "continues" in said.fix
    left = {p.name for p in (full.folder / "checkpoints").glob("checkpoint-*")}
    assert left == ({"checkpoint-4", "checkpoint-6"} if file == "export" else set())
    assert not (full.folder / "model").exists()
    again = workbench.context("full", **settings)
    list(Train().run(again))
    assert same(whole, again)
