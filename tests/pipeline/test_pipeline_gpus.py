"""Which GPUs a worker process sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.executor
from pipeline.config_file import load_config
from pipeline.executor import LocalExecutor
from pipeline.signals import StopSignals
from pipeline.worker import Order
from stages.catalog import BY_NAME


@pytest.mark.parametrize(
    ("processes", "train", "others"),
    [(1, ["0"], ["0,1", "2,3"]), (3, ["0,1,2"], ["0,1", "2,3"]), (0, ["0,1,2,3"], ["0,1", "2,3"])],
)
def test_the_train_worker_sees_a_gpu_per_process_and_other_workers_their_own(
    processes: int, train: list[str], others: list[str], write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.executor, "visible_gpus", lambda: ["0", "1", "2", "3"])
    config = load_config(write_config(train={"processes": processes}, engine={"tensor_parallel": 2}))
    executor = LocalExecutor(config, tmp_path, StopSignals())
    order = Order(BY_NAME["train"], 0, config, tmp_path, "", {}, {}, {})
    generate, gradients = (replace(order, spec=BY_NAME[name]) for name in ("generate", "gradients"))
    assert executor._count(generate) == 2
    assert executor._count(gradients) == 4
    for order_, seen in ((order, train), (generate, others), (gradients, ["0", "1", "2", "3"])):
        for slot, devices in enumerate(seen):
            assert executor._environment(slot, executor._width(order_))["CUDA_VISIBLE_DEVICES"] == devices


def test_a_worker_that_replaces_a_dead_one_takes_its_gpu(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.executor, "visible_gpus", lambda: ["0", "1", "2"])
    config = load_config(write_config())
    executor = LocalExecutor(config, tmp_path, StopSignals())
    seen: list[str] = []

    class Process:
        def __init__(self, target: Any, args: tuple[Any, ...], name: str) -> None:
            seen.append(args[3]["CUDA_VISIBLE_DEVICES"])

        def start(self) -> None:
            pass

    monkeypatch.setattr(executor._context, "Process", Process)
    order = Order(BY_NAME["gradients"], 0, config, tmp_path, "", {}, {}, {})
    for _ in range(3):
        executor._workers.append(executor._start(order))
    dead = executor._workers.pop(1)
    executor._workers.append(executor._start(order))
    assert seen == ["0", "1", "2", "1"]
    for member in [dead, *executor._workers]:
        member.connection.close()


@pytest.mark.parametrize(("shards", "workers", "threads"), [(9, 0, 4), (2, 0, 8), (9, 2, 8), (1, 4, 16)])
def test_all_cores_are_shared_between_the_workers_that_run(
    shards: int, workers: int, threads: int, write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.executor, "visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(pipeline.executor.os, "sched_getaffinity", lambda process: set(range(16)))
    config = load_config(write_config(execution={"workers": workers}))
    executor = LocalExecutor(config, tmp_path, StopSignals())
    seen: list[dict[str, str]] = []

    class Process:
        def __init__(self, target: Any, args: tuple[Any, ...], name: str) -> None:
            seen.append(args[3])

        def start(self) -> None:
            pass

    monkeypatch.setattr(executor._context, "Process", Process)
    monkeypatch.setattr(executor, "_attend", lambda order, queue, reports: None)
    monkeypatch.setattr(executor, "_send", lambda member, message: None)
    order = Order(BY_NAME["gradients"], 0, config, tmp_path, "", {}, {}, dict.fromkeys(range(shards)))  # type: ignore[arg-type]
    executor._run(order, None, None)  # type: ignore[arg-type]
    assert [s["OMP_NUM_THREADS"] for s in seen] == [str(threads)] * min(shards, workers or 4)
    for member in executor._workers:
        member.connection.close()
