"""Executors by the name that `execution.on` gives them: how one is started, what it needs, what `doctor` looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.executor import Executor
from pipeline.signals import StopSignals
from schemas.config import RunConfig
from stages.checks.finding import Finding
from stages.spec import Needs


@dataclass(frozen=True)
class ExecutorKind:
    """start(config, run directory, folder of logs, signals) makes one; needs: packages; findings(config): a line a node, for `doctor`."""

    start: Callable[[RunConfig, Path, Path, StopSignals], Executor]
    needs: Needs | None = None
    findings: Callable[[RunConfig], Iterator[Finding]] | None = None


def _local(config: RunConfig, root: Path, logs: Path, signals: StopSignals) -> Executor:
    from pipeline.local_crew import local_executor

    return local_executor(config, logs, signals)


def _ray(config: RunConfig, root: Path, logs: Path, signals: StopSignals) -> Executor:
    from pipeline.ray_crew import ray_executor  # imports Ray

    return ray_executor(config, root, logs, signals)


def _nodes(config: RunConfig) -> Iterator[Finding]:
    from pipeline.doctor_cluster import cluster_findings  # imports Ray

    return cluster_findings(config)


EXECUTORS = {
    "local": ExecutorKind(_local),
    "ray": ExecutorKind(
        _ray,
        Needs(("ray",), 'Install it on every node: pip install -e ".[ray]".', "Ray is not installed", "execution.on"),
        _nodes,
    ),
}
