"""Which GPUs and how many threads a worker process sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import local_crew, local_gpus
from pipeline.config_file import load_config
from pipeline.executors import EXECUTORS
from pipeline.local_crew import LocalCrew
from pipeline.messages import Order
from pipeline.pool import Pool, _Job
from pipeline.signals import StopSignals
from schemas.errors import UserError
from stages.catalog import BY_NAME


class NoChild:
    """A child that was never started."""

    def send(self, message: object) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environment of every worker that would have been started, on a machine with four GPUs and 16 cores."""
    environments: list[dict[str, str]] = []

    def start(entry: Any, arguments: Any, name: str, *, environment: dict[str, str], leads: bool) -> NoChild:
        environments.append(environment)
        return NoChild()

    monkeypatch.setattr(local_crew, "start_child", start)
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(local_crew.os, "sched_getaffinity", lambda process: set(range(16)))
    return environments


def order_of(stage: str, config: Any, folder: Path, shards: int = 0) -> Order:
    return Order(BY_NAME[stage], 0, config, folder, folder, "", {}, {}, dict.fromkeys(range(shards)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("processes", "train", "others"),
    [(1, ["0"], ["0,1", "2,3"]), (3, ["0,1,2"], ["0,1", "2,3"]), (0, ["0,1,2,3"], ["0,1", "2,3"])],
)
def test_the_train_worker_sees_a_gpu_per_process_and_other_workers_their_own(
    processes: int, train: list[str], others: list[str], write_config, tmp_path: Path, seen
) -> None:
    config = load_config(write_config(train={"processes": processes}, engine={"tensor_parallel": 2}))
    crew = LocalCrew(config, tmp_path)
    order = order_of("train", config, tmp_path)
    generate, gradients = (replace(order, spec=BY_NAME[name]) for name in ("generate", "gradients"))
    assert (crew.size(generate), crew.size(gradients)) == (2, 4)
    for each, wanted in ((order, train), (generate, others), (gradients, ["0", "1", "2", "3"])):
        seen.clear()
        for slot in range(len(wanted)):
            crew.start(each, slot, len(wanted))
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == wanted


def test_a_worker_that_replaces_a_dead_one_takes_its_gpu(write_config, tmp_path: Path, seen) -> None:
    config = load_config(write_config())
    pool = Pool(LocalCrew(config, tmp_path), config.execution, StopSignals())
    job = _Job(order_of("gradients", config, tmp_path), None, None, 3)  # type: ignore[arg-type]
    for _ in range(3):
        pool._seats.append(pool._start(job))
    pool._seats.pop(1)
    pool._seats.append(pool._start(job))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == ["0", "1", "2", "1"]


@pytest.mark.parametrize(("shards", "workers", "threads"), [(9, 0, 4), (2, 0, 8), (9, 2, 8), (1, 4, 16)])
def test_all_cores_are_shared_between_the_workers_that_run(
    shards: int, workers: int, threads: int, write_config, tmp_path: Path, seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(execution={"workers": workers}))
    pool = Pool(LocalCrew(config, tmp_path), config.execution, StopSignals())
    monkeypatch.setattr(pool, "_attend", lambda job: None)
    pool.run(order_of("gradients", config, tmp_path, shards), None, None)  # type: ignore[arg-type]
    assert [s["OMP_NUM_THREADS"] for s in seen] == [str(threads)] * min(shards, workers or 4)


def test_gpus_that_torch_cannot_use_are_refused_before_anything_is_done(
    write_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run starts and in a dry run; not for stages that need none."""
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config(write_config())
    reach = EXECUTORS["local"].reach
    with pytest.raises(UserError, match="can use no GPU here"):
        reach(config, [BY_NAME["gradients"]], 1)
    reach(config, [BY_NAME["select"]], 1)
    reach(load_config(write_config(execution={"device": "cpu"})), [BY_NAME["gradients"]], 1)


VLLM = {"kind": "vllm"}


@pytest.mark.parametrize(
    ("stage", "sections", "said"),
    [
        ("train", {"train": {"processes": 5}}, r"stage train takes 5 GPUs and 4 are visible \(train\.processes\)"),
        ("generate", {"engine": {**VLLM, "tensor_parallel": 8}}, r"takes 8 GPUs .*engine\.tensor_parallel"),
        (
            "generate",
            {"engine": {**VLLM, "tensor_parallel": 3}, "execution": {"workers": 2}},
            r"2 workers of stage generate take 3 GPUs each and 4 are visible \(execution\.workers",
        ),
        ("generate", {"engine": VLLM, "execution": {"workers": 5}}, r"are 2 on one, and each reserves 0\.9 of it"),
        ("generate", {"engine": {**VLLM, "gpu_memory_utilization": 0.4}, "execution": {"workers": 8}}, ""),
        ("generate", {"engine": {**VLLM, "tensor_parallel": 3}}, ""),
        ("gradients", {"execution": {"workers": 8}}, ""),
    ],
)
def test_fewer_gpus_than_workers_take_are_refused_before_anything_is_done(
    stage: str, sections: dict[str, Any], said: str, write_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    reach, config = EXECUTORS["local"].reach, load_config(write_config(**sections))
    if not said:
        reach(config, [BY_NAME[stage]], 1)
        return
    with pytest.raises(UserError, match=said):
        reach(config, [BY_NAME[stage]], 1)


def test_of_what_mig_cuts_a_worker_gets_one_part(write_config, tmp_path: Path, seen, monkeypatch) -> None:
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: ["MIG-a", "MIG-b"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(local_gpus, "refuse_without_compiler", lambda what: None)
    config = load_config(write_config(train={"processes": 0}))
    EXECUTORS["local"].reach(config, [BY_NAME["train"]], 1)
    crew = LocalCrew(config, tmp_path)
    crew.start(order_of("train", config, tmp_path), 0, 1)
    crew.start(order_of("gradients", config, tmp_path), 1, 2)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == ["MIG-a", "MIG-b"]
    with pytest.raises(UserError, match="MIG cuts those of this machine"):
        EXECUTORS["local"].reach(load_config(write_config(train={"processes": 2})), [BY_NAME["train"]], 1)


def test_training_on_gpus_without_a_compiler_is_refused_before_anything_is_done(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_gpus, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    config, reach = load_config(write_config()), EXECUTORS["local"].reach
    with pytest.raises(
        UserError, match=r"Stage train compiles .* no C compiler and no Python's headers .*gcc python3-dev"
    ):
        reach(config, [BY_NAME["train"]], 1)
    reach(config, [BY_NAME["gradients"]], 1)
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    reach(config, [BY_NAME["train"]], 1)
