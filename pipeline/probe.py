"""Whether machines are alike: each reads the same folder and runs the same code. Tried before any work, in seconds."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline
from schemas import files
from schemas.errors import UserError

_PROBE_BYTES = 1 << 20
_PACKAGES = ("ray", "torch", "transformers", "trl", "vllm", "polars", "pyarrow")


@dataclass(frozen=True)
class Look:
    """What a machine is. probe: the hash of what it read at the probe's path, or why it could not. read_mb_per_s: how fast."""

    versions: dict[str, str]
    probe: str
    read_mb_per_s: float
    cores: int


@contextmanager
def probe_in(root: Path) -> Iterator[tuple[Path, str]]:
    """(a file in `root` that was just written and is removed again, its hash)."""
    probe, content = root / f"probe-{secrets.token_hex(8)}", secrets.token_bytes(_PROBE_BYTES)
    files.make_folder(root)
    probe.write_bytes(content)
    files.fsync(probe)
    try:
        yield probe, hashlib.sha256(content).hexdigest()
    finally:
        probe.unlink(missing_ok=True)


def look(probe: Path) -> Look:
    """What this machine is and reads."""
    begun = time.monotonic()
    try:
        read = _read_when_there(probe)
        size = probe.stat().st_size
    except OSError as error:
        read, size = f"{error.strerror or error}", 0
    seconds = max(time.monotonic() - begun, 1e-6)
    return Look(versions(), read, size / 1e6 / seconds, len(os.sched_getaffinity(0)))


def _read_when_there(probe: Path) -> str:
    deadline = time.monotonic() + 5.0
    while True:
        try:
            return files.sha256(probe)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def refuse_others(found: Mapping[str, Look], mine: Look, expected: str, root: Path) -> None:
    """Raise UserError for a machine that did not read what was written in `root`, or runs other versions than this one. found: by name."""
    for name, seen in found.items():
        if seen.probe != expected:
            raise UserError(
                f"Node {name} does not see the run directory: it read something else there than was just written ({seen.probe})",
                where=str(root),
                fix="Put the run directory (run_dir, --run-dir) where every node sees it at the same path.",
            )
        refuse_other_versions(name, seen.versions, mine.versions)


def refuse_other_versions(name: str, seen: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Raise UserError for a machine that runs other versions than those the run was started with."""
    if other := [key for key in sorted({*mine, *seen}) if mine.get(key) != seen.get(key)]:
        told = ", ".join(f"{key} {seen.get(key)} (there {mine.get(key)})" for key in other)
        raise UserError(
            f"Node {name} has other versions than where the run was started: {told}",
            fix="Install the same lock and the same version of the pipeline on every node.",
        )


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What this process runs, as it was when it was first asked for."""
    found = {"python": platform.python_version(), "congrad": pipeline.__version__, "congrad's code": _code()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _code() -> str:
    """Hash of our own sources: two clones of one version may differ."""
    top = Path(pipeline.__file__).parent.parent
    total = hashlib.sha256()
    for package in ("pipeline", "schemas", "stages"):
        for path in sorted((top / package).rglob("*.py")):
            total.update(path.relative_to(top).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:12]
