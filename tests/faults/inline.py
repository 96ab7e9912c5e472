"""The run loop with fake stages, all in this process: milliseconds a run, so that it can be broken at every operation."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.lease
import pipeline.local_crew
import pipeline.loop
import stages.schedule
from pipeline import runner
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.executor import Reports
from pipeline.loop import RunOutcome
from pipeline.messages import Noted, Offered, Order, ToDriver
from pipeline.plan import Planner
from pipeline.rundir import KEPT, RunDir
from pipeline.selection import Selection
from pipeline.signals import StopSignals
from pipeline.writer import Writer
from schemas import files
from schemas.config import RunConfig
from stages.contract import Stopped

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
import fake_stages

SPECS = (fake_stages.PROMPTS, fake_stages.GENERATE, fake_stages.SELECT, fake_stages.TRAIN)


class InlineExecutor:
    """An executor with the worker's own code but no worker process."""

    computed: list[tuple[str, int]]
    """Parts that were offered, over all executors of a `fake_run`."""

    def __init__(self, *given: object) -> None:
        self._signals = next(each for each in given if isinstance(each, StopSignals))

    def run(self, order: Order, key: str | None, reports: Reports) -> None:
        queue = deque(order.shards[index] for index in sorted(order.shards))

        def tell(message: ToDriver) -> None:
            if isinstance(message, Offered):
                self.computed.append((order.spec.name, message.part.index))
                reports.offered(message.part, "here")
            elif isinstance(message, Noted):
                reports.note(message.message)

        ctx = runner.context_of(order, runner.ToldProgress(tell), lambda: bool(self._signals.asked), {})
        with self._signals.deferred(), suppress(Stopped):
            runner.run_order(order, ctx, lambda: queue.popleft() if queue else None, tell)
        self._signals.raise_if_asked()

    def close(self) -> None:
        """Nothing to end."""


class InlineWriter(Writer[...]):
    """Commits in this thread, so that file operations come in one order and all are watched."""

    def put(self, *args: Any, **kwargs: Any) -> None:
        self._commit(*args, **kwargs)


class FakeRun:
    """Runs the fake pipeline in `folder`. Settings are `a.b=c` overrides."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.root = folder, folder / "runs" / "t"
        self.computed: list[tuple[str, int]] = []
        self.path = folder / "config.yaml"
        base = {
            "name": "t",
            "run_dir": str(folder / "runs"),
            "languages": {"seen": ["en", "de"]},
            "model": {"policy": str(folder)},
            "prompts": {"sources": [{"path": "x"}], "max_chars": 10},
            "generate": {"shard_size": 4},
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(yaml.safe_dump(base | dict(settings)), encoding="utf-8")

    def __call__(self, *overrides: str, **selection: Any) -> RunOutcome:
        InlineExecutor.computed = self.computed
        config = load_config(self.path, overrides)
        return pipeline.loop.run(config, Selection(**selection), Display(quiet=True))

    def tables(self) -> dict[str, bytes]:
        """Every table file in its place in the run directory, recorded or not, and the trained artifact; not what is kept aside."""
        paths = [*self.root.rglob("*.parquet"), *self.root.glob("round-0/train/result.txt")]
        return {str(p.relative_to(self.root)): p.read_bytes() for p in sorted(paths) if KEPT not in p.parts}


def light_report(config: RunConfig, rundir: RunDir, planner: Planner) -> bool:
    """A page in milliseconds: what is published and when is the run loop's."""
    page = repr([state.manifest and state.manifest.content for state in planner.current()])
    if rundir.report.exists() and rundir.report.read_text(encoding="utf-8") == page:
        return False
    files.write_text(rundir.report, page)
    return True


@contextmanager
def fake_pipeline() -> Iterator[None]:
    """Replace the stages by the fake ones and the executor by the inline one; a dead process's lease is stale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.schedule, "STAGES", SPECS)
        patch.setattr(pipeline.loop, "config_files", lambda spec, config: {})
        patch.setattr(pipeline.loop, "preflight", lambda config, specs: None)
        patch.setattr(pipeline.loop, "refresh_report", light_report)
        patch.setattr(pipeline.local_crew, "local_executor", InlineExecutor)
        patch.setattr(runner, "Writer", InlineWriter)
        patch.setattr(pipeline.lease, "_process_lives", lambda holder: False)
        patch.setattr(pipeline.lease, "_SETTLE_SECONDS", 0.0)
        patch.setattr(
            os, "fsync", lambda descriptor: None
        )  # crashing.py models what it does; the disk is not waited for
        patch.setenv("FAKE_DIR", "/nonexistent")
        yield
