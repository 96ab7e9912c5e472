"""Fake runs, in this process and as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crews import LIGHT_RAY, SETTINGS
from tests.faults.inline import FakeRun, fake_pipeline


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeRun]:
    """A run of fake stages in this process: prompts of 10 rows, generate in 3 shards."""
    with fake_pipeline():
        yield FakeRun(tmp_path, {})


class FakeProcess:
    """`run` on the fake stages, up to the one that is cut into shards, as a process with one worker, of either crew. run: what it makes."""

    def __init__(self, folder: Path, crew: str) -> None:
        settings = {"prompts": {"sources": [{"path": "x"}], "max_chars": 12}, "generate": {"shard_size": 3}}
        self.run = FakeRun(folder, settings)
        sets = [word for setting in (*SETTINGS[crew], "execution.workers=1") for word in ("--set", setting)]
        main = Path(__file__).with_name("fake_main.py")
        self.command = [sys.executable, str(main), "run", str(self.run.path), "--until", "generate", *sets]
        self.environment = {"COLUMNS": "250"} | ({"PYTHONPATH": str(LIGHT_RAY)} if crew == "ray" else {})
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str, **environment: str) -> tuple[subprocess.Popen[str], FakeRun]:
        """Start it; (process, the run)."""
        process = subprocess.Popen(
            [*self.command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | self.environment | environment,
        )
        self.started.append(process)
        return process, self.run


@pytest.fixture
def fake_process(tmp_path: Path, crew: str) -> Iterator[FakeProcess]:
    """See FakeProcess; what was started is ended with the test."""
    found = FakeProcess(tmp_path, crew)
    yield found
    for process in found.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
