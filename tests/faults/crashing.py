"""Break the driver and the worker at every file operation in turn, then resume: nothing may be lost, doubled or mixed.

Three ways to end after operation k, each a worst case of what POSIX allows:

- crash: the process is gone, the machine lives: what was done stays.
- power cut, `lost`: no change of a folder that was not fsynced survives.
- power cut, `empty`: names survive, but files whose data was not fsynced are empty.
- power cut, `some`: each change that was not fsynced survives or not, drawn per operation.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.rundir import RunDir
from schemas.errors import UserError
from tests.faults.inline import SPECS, FakeRun, fake_pipeline

Ending = Literal["crash", "lost", "empty", "some"]
NAMES: dict[Ending, str] = {
    "crash": "crash",
    "lost": "power cut that undoes every change of a folder not fsynced",
    "empty": "power cut that empties every file not fsynced",
    "some": "power cut that undoes some changes of folders not fsynced",
}
ENDINGS = tuple(NAMES)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Crashed(BaseException):
    """The process died here. Not an Exception: nothing may handle it."""


@dataclass
class _Change:
    """A change of a folder's entries that no fsync of the folder has made durable yet."""

    folder: str
    undo: Callable[[], None]


@dataclass
class FileFaults:
    """Counts the file operations under `root` and ends the process at one of them.

    at: the operation (from 1) before which it ends; 0: never. After the end every operation fails: a dead process
    cleans nothing up.
    """

    root: Path
    at: int = 0
    count: int = 0
    dead: bool = False
    _pending: list[_Change] = field(default_factory=list)
    _durable: set[int] = field(default_factory=set)
    _hollow: dict[str, int] = field(default_factory=dict)

    def cut_power(self, ending: Ending, seed: int) -> None:
        """Leave on disk what survives a power cut now."""
        draw = random.Random(seed)
        if ending in ("lost", "some"):
            for change in reversed(self._pending):
                if ending == "lost" or draw.random() < 0.5:
                    change.undo()
        if ending == "empty":
            for path, inode in self._hollow.items():
                with suppress(FileNotFoundError):
                    if os.stat(path).st_ino == inode:
                        os.truncate(path, 0)

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Watch the file operations of this thread."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync", "open"):
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            patch.setattr(io, "open", self._watched_open(io.open))
            yield

    def _step(self) -> None:
        if self.dead:
            raise Crashed
        self.count += 1
        if self.count == self.at:
            self.dead = True
            raise Crashed

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() or not self._ours(name, args, kwargs):
                return real(*args, **kwargs)
            self._step()
            if name == "fsync":
                return self._fsync(args[0])
            note = self._note(name, args)
            result = real(*args, **kwargs)
            note()
            return result

        return call

    def _watched_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and not isinstance(file, int) and self._inside(file):
                self._step()
            return real(file, mode, *args, **kwargs)

        return call

    def _inside(self, path: Any) -> bool:
        return self.root in Path(os.path.abspath(os.fspath(path))).parents

    def _ours(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name == "fsync":
            return Path(os.readlink(f"/proc/self/fd/{args[0]}")).is_relative_to(self.root)
        if kwargs.get("dir_fd") is not None:  # inside shutil.rmtree
            return Path(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}")).is_relative_to(self.root)
        return self._inside(args[0]) and (name != "open" or bool(args[1] & _WRITES))

    def _fsync(self, descriptor: int) -> None:
        """Durable in the model; the real disk need not be waited for."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            self._pending = [c for c in self._pending if c.folder != path]
        else:
            self._durable.add(os.fstat(descriptor).st_ino)

    def _note(self, name: str, args: tuple[Any, ...]) -> Callable[[], None]:
        """What to remember once the operation has succeeded."""
        if name in ("replace", "rename"):
            source, target = (os.path.abspath(a) for a in args[:2])
            return self._note_rename(source, target)
        if name == "mkdir":
            path = os.path.abspath(args[0])
            return lambda: self._add(path, lambda: shutil.rmtree(path, ignore_errors=True))
        if name in ("unlink", "remove") and os.path.isabs(args[0]) and os.path.isfile(args[0]):
            path, content = os.path.abspath(args[0]), Path(args[0]).read_bytes()
            return lambda: self._add(path, lambda: _restore(path, content))
        return lambda: None

    def _note_rename(self, source: str, target: str) -> Callable[[], None]:
        old = Path(target).read_bytes() if os.path.isfile(target) else None
        inode = os.stat(source).st_ino

        def undo() -> None:
            with suppress(OSError):
                os.replace(target, source)
            if old is not None:
                _restore(target, old)

        def note() -> None:
            self._add(target, undo)
            if inode not in self._durable and os.path.isfile(target):
                self._hollow[target] = inode

        return note

    def _add(self, path: str, undo: Callable[[], None]) -> None:
        self._pending.append(_Change(os.path.dirname(path), undo))


def _restore(path: str, content: bytes) -> None:
    with suppress(OSError):
        Path(path).write_bytes(content)


@dataclass
class Tried:
    """Faults tried, and what was wrong after them."""

    count: int = 0
    wrong: list[str] = field(default_factory=list)


def break_everywhere(folder: Path, endings: tuple[Ending, ...] = ENDINGS, every: int = 1) -> Tried:
    """A first run, and a run with changed settings over a finished one, ended at every `every`-th file operation."""
    tried = Tried()
    with fake_pipeline():
        first = FakeRun(folder / "first", {})
        first()
        changed = FakeRun(folder / "changed", {"generate": {"shard_size": 7, "candidates": 5}})
        changed()
        for ending in endings:
            _break(folder, ending, every, tried, None, first)
            _break(folder, ending, every, tried, first, changed)
    return tried


def _break(folder: Path, ending: Ending, every: int, tried: Tried, before: FakeRun | None, wanted: FakeRun) -> None:
    """End runs that go from `before` (nothing, or a finished run) to `wanted` at each operation; resume; compare."""
    at, finished = 1 + ENDINGS.index(ending) * every // len(ENDINGS), False
    settings = [] if before is None else ["generate.shard_size=7", "generate.candidates=5"]
    force = () if before is None else ("generate",)
    while not finished:
        broken = FakeRun(folder / f"{ending}-{before is None}-{at}", {})
        if before is not None:
            shutil.copytree(before.root, broken.root)
        faults = FileFaults(broken.root, at)
        try:
            with faults.injected():
                broken(*settings, force=force)
            finished = True
        except Crashed:
            faults.cut_power(ending, seed=at)
            tried.count += 1
            case = f"{ending} at operation {at} of {'a first' if before is None else 'a changed'} run"
            wrong = _resume(broken, settings, force, wanted)
            if before is not None and not wrong:
                wrong = _go_back(broken, before)
            tried.wrong += [f"{case}: {problem}" for problem in wrong]
        shutil.rmtree(broken.folder)
        at += every


def _resume(broken: FakeRun, settings: list[str], force: tuple[str, ...], wanted: FakeRun) -> list[str]:
    """Run again until the end; what is wrong then."""
    whole = len(wanted.computed) - (1 if force else 0)  # forced: not the prompts
    try:
        broken(*settings, force=force)
    except UserError as error:
        return [str(error)]
    wrong = []
    got, right = broken.tables(), wanted.tables()
    wrong += [f"{n} is missing or differs" for n in right if got.get(n) != right[n] and not n.endswith(".txt")]
    wrong += [f"{name} is too much" for name in sorted(set(got) - set(right))]
    wrong += [f"{p.name} was left" for p in broken.root.rglob("*") if p.name.startswith(".") or p.parent.name == "_tmp"]
    if len(broken.computed) > whole + 1:
        wrong.append(f"{len(broken.computed)} parts were made for {whole}")
    rundir = RunDir(broken.root)
    for spec in SPECS:
        manifest = rundir.stage(spec, 0)
        if manifest is None or rundir.verify(manifest.files):
            wrong.append(f"{spec.name}: its manifest is missing or does not fit its files")
    return wrong


def _go_back(broken: FakeRun, before: FakeRun) -> list[str]:
    """Run with the settings of before: what was finished with them is found, not made anew."""
    made = list(broken.computed)
    try:
        broken()
    except UserError as error:
        return [f"going back: {error}"]
    wrong = [f"going back made {part} anew" for part in broken.computed[len(made) :]]
    return wrong + (["going back gives other tables"] if broken.tables() != before.tables() else [])


@contextmanager
def failing(operation: str, number: int, *, after: int = 0) -> Iterator[None]:
    """Let an operation of `os` fail with an errno, from its call `after` + 1 on."""
    real, calls = getattr(os, operation), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number), str(args[0]))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, operation, call)
        yield


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
