"""Runs a model's conversion in a process of its own: torch stays out of the caller, memory goes back at the end.

Both waits have a limit: a conversion that hangs (a stalled download, a dead file system) is ended, and so is the wait for another's.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import stages
from schemas.errors import UserError
from schemas.secrets import without_secrets
from stages.text.visible import visible
from stages.text.words import duration

CONVERSION_SECONDS = 4 * 3600.0
"""For one conversion: hundreds of gigabytes from a slow disk end well before."""
_POLL_SECONDS = 0.2
_PATIENT_SECONDS = 60.0


def with_this_code() -> dict[str, str]:
    """The environment in which a child Python finds this code, wherever it is started."""
    root = str(Path(stages.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def run_module(module: str, arguments: list[str], what: str, seconds: float = CONVERSION_SECONDS) -> None:
    """`python -m module arguments`, its lines on standard error shown as they come.

    Raises UserError when it fails, or has not ended after so many seconds: it is killed then.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, env=with_this_code(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            run.kill()

        limit = threading.Timer(seconds, end)
        limit.daemon = True
        limit.start()
        tail: list[str] = []
        try:
            for line in run.stderr:
                sys.stderr.write(visible(without_secrets(line)))
                tail = [*tail[-19:], line.rstrip()]
        finally:
            limit.cancel()
    if late.is_set():
        raise UserError(
            f"{what} has not ended after {duration(seconds)}, so it was stopped",
            fix="See whether the disk, or the place it downloads from, still answers; running again continues safely.",
        )
    if run.returncode:
        last = next((line for line in reversed(tail) if line.strip()), f"exit status {run.returncode}")
        raise UserError(f"{what} failed: {last}", fix="The lines above say more; running again continues safely.")


def say(message: str) -> None:
    """A progress line of a conversion process."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


@contextmanager
def one_at_a_time(lock: Path, seconds: float = CONVERSION_SECONDS) -> Iterator[None]:
    """Wait until no other process on this machine holds `lock`; released when the process ends, however it ends.

    Says once a minute whom it waits for. Raises UserError when the other has not let go after so many seconds.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="utf-8") as file:
        begun = time.monotonic()
        patience = _PATIENT_SECONDS
        while not _taken(file.fileno()):
            waited = time.monotonic() - begun
            if waited > seconds:
                raise UserError(
                    f"Another process{_holder(lock)} has been making the same file for {duration(seconds)}",
                    where=str(lock),
                    fix="See whether it still works; end it if not, and run again.",
                )
            if waited > patience:
                say(f"waiting for another process{_holder(lock)} that makes {lock.stem}")
                patience += _PATIENT_SECONDS
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: Path) -> str:
    """` (process 12)`, as far as the file says."""
    number = lock.read_text(encoding="utf-8", errors="replace").strip()
    return f" (process {number})" if number.isdecimal() else ""
