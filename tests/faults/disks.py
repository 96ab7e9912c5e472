"""Fill up the disk in every stage of a whole run on a tiny model, then make room: the same command finishes it.

make faults-disk                                 Linux; root, or a user who may mount in a namespace of his own
make faults-disk ARGS="--only train export"

The run directory lies on a small tmpfs. For every stage, in order:

- read-only: mounted so, while the stage is next;
- limit: room enough, but no file may be as large as the stage's largest (RLIMIT_FSIZE, as `ulimit -f`);
- full: room for a little, then for a little more, until the same command finishes the stage.

Each refusal must come with exit code 1, one paragraph that says what the disk refuses, and no traceback. After the last stage every table and
weight has the bytes of an undisturbed run. Exports go to a full disk and to a read-only one too. The stages run in this process, by the
worker's own code: minutes become seconds. (`test_faults_disk.py` fills the disk below real workers.)
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.executor import Reports
from pipeline.messages import Order
from pipeline.storage import storage_error
from schemas.errors import UserError
from schemas.manifests import StageManifest
from tests.conftest import make_model, make_tokenizer
from tests.end_to_end.conftest import inline, tiny_config
from tests.faults.inline import InlineExecutor
from tests.faults.killing import STAGES, results

_INSIDE = "CONGRAD_TEST_NAMESPACE"
_PAGE = 4096
_STEP = 6 * _PAGE
_STEPS = 8
"""How often there is too little room, at most."""
_ROOMY = 1 << 28
_EXPORTS = ("dataset", "model", "adapter")
_WORDS = ("The disk is full", "size limit", "read-only", "Read-only", "No space left")


@dataclass(frozen=True)
class Outcome:
    """What came of one refusal. said: the paragraph; problems: what is not as promised; fitted: there was room enough."""

    step: str
    how: str
    seconds: float
    said: str
    problems: tuple[str, ...]
    fitted: bool = False


class Small:
    """A tmpfs whose size changes while it is mounted; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Small:
        self.folder.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={_ROOMY}", "small", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def leave(self, room: int) -> None:
        """So many bytes more than it holds."""
        held = os.statvfs(self.folder)
        used = (held.f_blocks - held.f_bfree) * held.f_bsize
        self._remount(f"rw,size={used + room}")

    def roomy(self) -> None:
        """Writable, with room for everything."""
        self._remount(f"rw,size={_ROOMY}")

    def read_only(self) -> None:
        """Nothing may be written."""
        gc.collect()  # of a run that failed a moment ago a file may still be open
        self._remount("ro")

    def _remount(self, options: str) -> None:
        _mount("-o", f"remount,{options}", str(self.folder))


def main() -> int:
    """Try everything; 1 if anything was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="stages, or export (default: all)")
    only = set(parser.parse_args().only)
    if _INSIDE not in os.environ:
        inside = [sys.executable, "-m", "tests.faults.disks", *sys.argv[1:]]
        os.execvpe("unshare", ["unshare", "-rm", *inside], os.environ | {_INSIDE: "1", "COLUMNS": "250"})
    console = Console(width=160, highlight=False)
    wrong = tried = 0
    with tempfile.TemporaryDirectory(prefix="disks-") as name, pytest.MonkeyPatch.context() as patch, inline(patch):
        patch.setattr(InlineExecutor, "run", _told)
        for outcome in _all(Path(name), only):
            tried += 1
            wrong += bool(outcome.problems)
            verdict = "; ".join(outcome.problems) or "as promised"
            line = f"{outcome.step:16} {outcome.how:10} {outcome.seconds:5.1f} s  {verdict}\n    {outcome.said}"
            console.print(line, markup=False)
    console.print(f"disks: {tried} tried, {tried - wrong} as promised")
    return int(wrong > 0)


def _all(folder: Path, only: set[str]) -> Iterator[Outcome]:
    config = folder / "config.yaml"
    model = make_model(folder / "models" / "tiny", make_tokenizer())
    config.write_text(yaml.safe_dump(tiny_config(folder, model)), encoding="utf-8")
    _finish(_run(config, folder / "runs"))
    wanted = folder / "runs" / "t"
    with Small(folder / "small") as small:
        run = small.folder / "t"
        for spec in STAGES:
            command = [*_run(config, small.folder), "--until", spec.name]
            if not only or spec.name in only:
                yield from _refused(small, command, spec.name, _written(wanted, spec.name))
            _finish(command)
        _finish(_run(config, small.folder))
        yield _equal(run, wanted)
        if not only or "export" in only:
            for what in _EXPORTS:
                with Small(folder / f"export-{what}") as other:
                    yield from _exported(other, run, what)


def _refused(small: Small, command: list[str], stage: str, sizes: list[int]) -> Iterator[Outcome]:
    small.read_only()
    yield _one(command, stage, "read-only")
    small.roomy()
    with _largest_file(max(sizes) - 1):
        outcome = _one(command, stage, "limit")
    yield outcome
    whole = sum(-(-size // _PAGE) * _PAGE for size in sizes)
    step = max(_STEP, whole // _STEPS // _PAGE * _PAGE)
    for room in range(_PAGE, _STEPS * step + 1, step):
        small.leave(room)
        outcome = _one(command, stage, f"full {room // 1024}k")
        small.roomy()
        if outcome.fitted:
            return
        yield outcome


def _exported(small: Small, run: Path, what: str) -> Iterator[Outcome]:
    out = small.folder / "out"
    command = ["export", str(run), "--what", what, "--out", str(out)]
    for room in (1, 4, 8):
        small.leave(room * _PAGE)
        outcome = _one(command, f"export {what}", f"full {room * _PAGE // 1024}k")
        small.roomy()
        if not outcome.fitted:
            yield outcome
    small.read_only()
    yield _one(command, f"export {what}", "read-only")
    small.roomy()
    done = _command(command)
    problems = () if done.exit_code == 0 else (f"does not go on: {done.output[-600:]}",)
    yield Outcome(f"export {what}", "again", 0.0, f"{len(list(out.rglob('*')))} files", problems)


_run_inline = InlineExecutor.run


def _told(executor: InlineExecutor, order: Order, key: str | None, reports: Reports) -> None:
    """Errors of a stage come to the driver as `runner.carry_out` tells them."""
    try:
        _run_inline(executor, order, key, reports)
    except UserError:
        raise
    except Exception as error:
        if (disk := storage_error(error, order.root)) is None:
            raise
        raise disk from error


def _one(command: list[str], step: str, how: str) -> Outcome:
    begun = time.monotonic()
    done = _command(command)
    problems = []
    if done.exit_code != 1:
        problems.append(f"exit code {done.exit_code}")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        problems.append(f"a traceback: {done.exception!r}")
    if not any(word in done.output for word in _WORDS):
        problems.append("not said")
    shown = done.output if problems else done.output.strip().rpartition("\n\n")[2]
    said = " ".join(shown[-1500:].split())
    return Outcome(step, how, time.monotonic() - begun, said, tuple(problems), done.exit_code == 0)


def _equal(run: Path, wanted: Path) -> Outcome:
    got, want = results(run), results(wanted)
    differs = tuple(f"{name} differs" for name in sorted(set(got) | set(want)) if got.get(name) != want.get(name))
    return Outcome("all", "results", 0.0, f"{len(want)} tables, weights and accounts compared", differs)


def _finish(command: list[str]) -> None:
    done = _command(command)
    if done.exit_code:
        raise SystemExit(f"{' '.join(command)} ended with {done.exit_code}: {done.output[-3000:]}")


def _command(command: list[str]) -> Result:
    return CliRunner().invoke(app, command)


def _run(config: Path, folder: Path) -> list[str]:
    return ["run", str(config), "--run-dir", str(folder), "--quiet"]


def _written(run: Path, stage: str) -> list[int]:
    """Sizes of the files that the stage wrote in an undisturbed run."""
    [found] = run.rglob(f"{stage}/_stage.json")
    manifest = StageManifest.model_validate_json(found.read_text(encoding="utf-8"))
    return [(run / file.path).stat().st_size for file in manifest.files]


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
