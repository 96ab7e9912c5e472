"""One writer per run directory: a lease file with a heartbeat, on plain files so that it works on NFS.

A lease is taken by creating the file exclusively. A stale one (its process is gone on this host, or its heartbeat is
old on another) is replaced by rename, and the taker reads it back: the last rename wins, so two takers cannot both win.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from pipeline import files
from schemas.errors import UserError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
_SETTLE_SECONDS = 0.2


class LeaseLost(Exception):
    """Another process has taken the run directory over."""


class Lease:
    """Context manager that holds a run directory. Raises UserError if another live process holds it."""

    def __init__(self, root: Path) -> None:
        self._path = root / "_lease.json"
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "nonce": uuid.uuid4().hex,
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._me | {"heartbeat": time.time()})
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = self._read()
            if holder and _alive(holder):
                raise UserError(
                    f"Another run is working in this directory (host {holder['host']}, process {holder['pid']})",
                    where=str(self._path.parent),
                    fix="Wait for it, stop it, or use another --run-dir.",
                ) from None
            files.write_text(self._path, text)
            time.sleep(_SETTLE_SECONDS)
        else:
            with os.fdopen(descriptor, "w") as handle:
                handle.write(text)
        self.check()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        holder = self._read()
        if holder and holder.get("nonce") == self._me["nonce"]:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise LeaseLost unless the lease is still ours."""
        holder = self._read()
        if not holder or holder.get("nonce") != self._me["nonce"]:
            raise LeaseLost(f"{self._path} now belongs to {holder or 'nobody'}")

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
            except LeaseLost:
                return
            files.write_text(self._path, json.dumps(self._me | {"heartbeat": time.time()}))

    def _read(self) -> dict | None:
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) and {"host", "pid", "heartbeat"} <= set(value) else None


def holder_of(root: Path) -> dict | None:
    """The live holder of a run directory, for `status`."""
    holder = Lease(root)._read()
    return holder if holder and _alive(holder) else None


def _alive(holder: dict) -> bool:
    if holder["host"] == socket.gethostname():
        return _started(int(holder["pid"])) == holder.get("started")
    return time.time() - float(holder["heartbeat"]) < STALE_SECONDS


def _started(pid: int) -> float | None:
    """Start time of a process, so that a reused pid is not mistaken for it; None if there is none."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
