"""A conversion in a process of its own, and the wait for another's, end when their time is over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from schemas.errors import UserError
from stages.models import process
from stages.models.process import one_at_a_time, run_module

SLEEP = ["-n", "1", "import time; time.sleep(60)"]


@contextmanager
def holder(lock: Path) -> Iterator[int]:
    """Another process that holds the lock; its id."""
    code = (
        "import sys, time; from pathlib import Path; from stages.models.process import one_at_a_time\n"
        "with one_at_a_time(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            yield other.pid
        finally:
            other.kill()


def test_a_conversion_that_hangs_is_ended_and_said() -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"Fetching x has not ended after 0 s, so it was stopped"):
        run_module("timeit", SLEEP, "Fetching x", seconds=0.5)
    assert time.monotonic() - begun < 30


def test_the_wait_for_another_process_ends_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "_PATIENT_SECONDS", 0.1)
    lock = tmp_path / "models" / "m.lock"
    with holder(lock) as pid:
        with pytest.raises(UserError, match=rf"process {pid}.*0 s"), one_at_a_time(lock, seconds=0.5):
            pass
        assert f"waiting for another process (process {pid}) that makes m" in capsys.readouterr().err
    with one_at_a_time(lock, seconds=20):  # it was killed: the lock is free
        assert lock.read_text() == str(os.getpid())
