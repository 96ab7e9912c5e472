"""Executors by the name that `execution.on` gives them: how one is started, what it needs, what `doctor` looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.executor import Executor
from pipeline.local_gpus import refuse_gpus
from pipeline.signals import StopSignals
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.checks.finding import Finding
from stages.contract import Machine
from stages.spec import Needs, StageSpec


@dataclass(frozen=True)
class Place:
    """What an executor is given: the run directory, the folder of logs, signals to heed, and the machines that were started with this one."""

    root: Path
    logs: Path
    signals: StopSignals
    machines: tuple[Machine, ...] = ()


@dataclass(frozen=True)
class ExecutorKind:
    """start(config, stages with work, place) makes one. reach(config, stages, machines): as far as that goes without a change anywhere;
    raises UserError where starting would. needs: packages; findings(config): a line a node, for `doctor`."""

    start: Callable[[RunConfig, Sequence[StageSpec], Place], Executor]
    reach: Callable[[RunConfig, Sequence[StageSpec], int], None]
    needs: Needs | None = None
    findings: Callable[[RunConfig], Iterator[Finding]] | None = None


def _local(config: RunConfig, specs: Sequence[StageSpec], place: Place) -> Executor:
    from pipeline.local_crew import local_executor

    _suffices(config, specs, 1 + len(place.machines))
    return local_executor(config, place.logs, place.signals, place.machines)


def _suffices(config: RunConfig, specs: Sequence[StageSpec], machines: int) -> None:
    """Raise UserError for stages that need more machines, or other GPUs, than there are."""
    _refuse_lonely(config, specs, machines)
    refuse_gpus(config, specs)


def _refuse_lonely(config: RunConfig, specs: Sequence[StageSpec], machines: int) -> None:
    for spec in specs:
        if (wanted := spec.spans(config, machines)) > machines:
            raise UserError(
                f"Stage {spec.name} is to run on {wanted} machines, and this command was started on one",
                where=spec.machines,
                fix="Start it on all of them with torchrun, srun or Kubernetes, or use execution.on: ray (docs/scale.md).",
            )


def _ray(config: RunConfig, specs: Sequence[StageSpec], place: Place) -> Executor:
    from pipeline.cluster_crew import ray_executor

    return ray_executor(config, specs, place.root, place.logs, place.signals)


def _answers(config: RunConfig, specs: Sequence[StageSpec], machines: int) -> None:
    from pipeline.cluster_crew import refuse_unreachable

    refuse_unreachable(config, specs)


def _nodes(config: RunConfig) -> Iterator[Finding]:
    from pipeline.doctor_cluster import cluster_findings

    return cluster_findings(config)


EXECUTORS = {
    "local": ExecutorKind(_local, _suffices),
    "ray": ExecutorKind(
        _ray,
        _answers,
        Needs(("ray",), 'Install it on every node: pip install -e ".[ray]".', "Ray is not installed", "execution.on"),
        _nodes,
    ),
}
