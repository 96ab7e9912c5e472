"""Runs a model's conversion in a process of its own: torch stays out of the caller, memory goes back at the end."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import stages
from schemas.errors import UserError
from schemas.secrets import without_secrets
from stages.text.visible import visible


def run_module(module: str, arguments: list[str], what: str) -> None:
    """`python -m module arguments`, its lines on standard error shown as they come; UserError when it fails."""
    root = str(Path(stages.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        tail: list[str] = []
        for line in run.stderr:
            sys.stderr.write(visible(without_secrets(line)))
            tail = [*tail[-19:], line.rstrip()]
    if run.returncode:
        last = next((line for line in reversed(tail) if line.strip()), f"exit status {run.returncode}")
        raise UserError(f"{what} failed: {last}", fix="The lines above say more; running again continues safely.")


def say(message: str) -> None:
    """A progress line of a conversion process."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process on this machine holds `lock`; released when the process ends, however it ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
