"""One writer per run directory: a lease file with a heartbeat, on plain files so that it works on NFS.

A lease is taken by creating the file exclusively. Whether its holder lives is decided without comparing clocks: on the
same machine (same boot, same process namespace) by its process; elsewhere by watching whether the heartbeat changes
(`status` alone believes a heartbeat that is young by the clock here). A stale lease is replaced by rename, and the taker
reads it back: the last rename wins. A holder that finds another's lease in place of its own stops: the heartbeat looks
every few seconds, the run loop before every manifest it writes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from schemas import files
from schemas.errors import UserError

HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 45.0
_SETTLE_SECONDS = 0.2
_POLL_SECONDS = 0.5
_NAME = "_lease.json"


class LeaseLost(UserError):
    """Another process has taken the run directory over, or the heartbeat cannot be written."""


class Lease:
    """Context manager that holds a run directory. Raises UserError if another live process holds it.

    say: told when another machine's lease has to be watched first.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda message: None) -> None:
        self._path, self._say = root / _NAME, say
        pid = os.getpid()
        self._me = {
            "host": socket.gethostname(),
            "space": _space(),
            "pid": pid,
            "started": _started(pid),
            "nonce": uuid.uuid4().hex,
        }
        self._beats = 0
        self._lost = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        files.make_folder(self._path.parent)
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            self._refuse_if_held()
            try:
                self._write()
            except FileNotFoundError:  # a faster taker has cleaned up
                raise _held(self._path, _read(self._path) or {}) from None
            time.sleep(_SETTLE_SECONDS)
        else:
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                handle.write(self._text())
        self.check()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(WATCH_SECONDS)  # its write may hang with the disk: it dies with the process
        if _nonce(_read(self._path)) == self._me["nonce"]:
            self._path.unlink(missing_ok=True)

    @property
    def nonce(self) -> str:
        """What no other holder of any lease has."""
        return str(self._me["nonce"])

    def is_anothers(self) -> bool:
        """Whether another process holds the directory, by what is on disk."""
        return _nonce(_read(self._path)) not in (None, self._me["nonce"])

    def check(self) -> None:
        """Raise LeaseLost unless the lease on disk is ours."""
        self.check_heartbeat()
        holder = _read(self._path)
        if _nonce(holder) != self._me["nonce"]:
            self._lost = _who(holder)
            self.check_heartbeat()

    def check_heartbeat(self) -> None:
        """Raise LeaseLost if the heartbeat found that the lease is no longer ours. Reads no file."""
        if self._lost:
            raise LeaseLost(
                f"This run no longer holds its directory: {self._lost}",
                where=str(self._path.parent),
                fix="It stopped, so that two runs never write at once. See what `congrad status` says.",
            )

    def _refuse_if_held(self) -> None:
        """Raises UserError while the holder lives; returns when it is known to be gone."""
        holder = _read(self._path)
        if holder is not None and holder.get("space") == self._me["space"] is not None:
            lives = _process_lives(holder)
            if lives:
                raise _held(self._path, holder)
            if lives is False:
                return
        if holder is not None:
            self._say(_watching(holder, WATCH_SECONDS))
        if _changes(self._path, WATCH_SECONDS if holder is not None else 2 * _POLL_SECONDS):
            raise _held(self._path, _read(self._path) or holder or {})

    def _text(self) -> str:
        self._beats += 1
        return json.dumps(self._me | {"beat": self._beats, "heartbeat": time.time()})

    def _write(self) -> None:
        files.write_text(self._path, self._text())

    def _beat(self) -> None:
        written = time.monotonic()
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
                self._write()
            except LeaseLost:
                return
            except OSError as error:
                if time.monotonic() - written > WATCH_SECONDS / 2:
                    self._lost = f"its heartbeat could not be written ({error.strerror})"
                    return
            else:
                written = time.monotonic()


def holder_of(root: Path, say: Callable[[str], None] = lambda message: None) -> dict[str, Any] | None:
    """The holder of a run directory, for `status`. One on another machine whose heartbeat is old by the clock here is watched for the
    length of one, since clocks differ. say: told so."""
    holder = _read(root / _NAME)
    if holder is None:
        return None
    lives = _process_lives(holder) if holder.get("space") == _space() is not None else None
    if lives is not None:
        return holder if lives else None
    if abs(time.time() - float(holder["heartbeat"])) < WATCH_SECONDS:
        return holder
    seconds = HEARTBEAT_SECONDS + 2
    say(_watching(holder, seconds))
    return _read(root / _NAME) if _changes(root / _NAME, seconds) else None


def _changes(path: Path, seconds: float) -> bool:
    """Whether a lease is written within so many seconds. Returns at once when it is."""
    before, deadline = _bytes(path), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if (now := _bytes(path)) != before and now is not None:
            return True
    return False


def _watching(holder: dict[str, Any], seconds: float) -> str:
    return f"A run on {holder['host']} left its lease here; watching for {seconds:.0f} s whether it lives"


def _held(path: Path, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"Another run is working in this directory ({_who(holder)})",
        where=str(path.parent),
        fix="Wait for it, stop it, or use another run directory.",
    )


def _who(holder: dict[str, Any] | None) -> str:
    if not holder:
        return f"{_NAME} is gone: the directory was moved or cleaned"
    return f"host {holder.get('host')}, process {holder.get('pid')} holds it"


def _nonce(holder: dict[str, Any] | None) -> Any:
    return holder.get("nonce") if holder else None


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(_bytes(path) or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) and {"host", "pid", "heartbeat"} <= set(value) else None


def _process_lives(holder: dict[str, Any]) -> bool | None:
    """Of a process of this boot; None: that cannot be seen, since /proc hides those of other users (hidepid)."""
    pid = int(holder["pid"])
    found = _started(pid)
    if found is None and _is_hidden(pid):
        return None
    return holder.get("started") is not None and found == holder["started"]


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process, of which /proc says nothing to this user."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}/stat").exists()
    except OSError:
        return False
    return False


def _space() -> str | None:
    """This boot of this machine and this process namespace: where a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, which no change of the clock moves; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
