"""Fake runs, in this process and as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.inline import FakeRun, fake_pipeline


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeRun]:
    """A run of fake stages in this process: prompts of 10 rows, generate in 3 shards."""
    with fake_pipeline():
        yield FakeRun(tmp_path, {})


@pytest.fixture
def fake_process(tmp_path: Path):
    """Start `run` on the fake stages as a process with workers; returns (process, the run)."""
    started: list[subprocess.Popen[str]] = []
    run = FakeRun(tmp_path, {"prompts": {"sources": [{"path": "x"}], "max_chars": 12}, "generate": {"shard_size": 3}})

    def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], FakeRun]:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fake_main.py")), "run", str(run.path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"COLUMNS": "250"} | environment,
        )
        started.append(process)
        return process, run

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
