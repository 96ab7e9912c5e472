"""What the driver costs where a stage has very many parts: a commit, `status`, and planning what is left of a half-done stage.

    python -m benchmarks.driver_scale [--parts 200000] [--commits 2000] [--folder DIR]

Planning says which parts are there; what they add up to is read once, when the stage goes on.

Parts are one byte a table, with the tallies of ten languages: what they hold is no business of the driver's. Every figure stands beside a
baseline of the same run: what the disk takes alone. For commits: the same files renamed, written and flushed by plain calls. For the
others: the same folders listed and the same manifests read, nothing made of them, in a process of its own. Memory is the process's peak.
Linux only (it reads /proc). Exit code 1 when an aim is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.commit import PreparedPart, commit
from pipeline.events import Events
from pipeline.failures import Failures
from pipeline.rundir import RunDir
from schemas.files import fsync
from schemas.manifests import FileRecord, PartManifest, Tally
from stages.catalog import BY_NAME
from tests.faults.many_parts import LANGUAGES, SHA, finished_run

_STAGE = "generate"
_PEAK = """
import atexit, sys
def peak():
    lines = open("/proc/self/status").read().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
atexit.register(peak)
"""
_STATUS = """
import runpy, sys
sys.argv = ["pipeline", "status", sys.argv[1]]
runpy.run_module("pipeline", run_name="__main__")
"""
_PLAN = """
import sys
from pathlib import Path
from pipeline.status import states_of
state = next(s for s in states_of(Path(sys.argv[1])) if s.step.spec.name == "generate")
assert state.kind == "resume" and len(state.committed) == int(sys.argv[2]), (state.kind, len(state.committed))
"""
_GO_ON = """
import sys
from pathlib import Path
from pipeline.rundir import RunDir
from stages.catalog import BY_NAME
assert len(RunDir(Path(sys.argv[1])).parts(BY_NAME["generate"], 0, range(int(sys.argv[2])))) == int(sys.argv[2])
"""
_READ = """
import os, sys
for folder in sys.argv[1:]:
    for entry in os.scandir(folder):
        if entry.name.endswith(".json"):
            with open(entry.path, "rb") as file:
                file.read()
        else:
            entry.stat()
"""


def child(code: str, *arguments: str) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a Python process. Raises RuntimeError when it fails."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds, int(done.stderr.split()[-1]) / 1024


def best(measure: Callable[[], tuple[float, float]], repeats: int = 3) -> tuple[float, float]:
    """The fastest of some."""
    return min(measure() for _ in range(repeats))


def commits(root: Path, first: int, count: int) -> tuple[float, float, float]:
    """Microseconds, in the middle: of a commit on disk, of the driver's bookkeeping beside it, and of the same files written by plain calls."""
    rundir, spec = RunDir(root), BY_NAME[_STAGE]
    plan = rundir.plan(spec, 0)
    assert plan is not None
    parts = rundir.parts(spec, 0, rundir.committed(spec, 0, plan.fingerprint))
    failures, events = Failures(rundir, spec, 0, 0.5), Events(rundir.events)
    scratch = rundir.temporary / "bench"
    scratch.mkdir(parents=True, exist_ok=True)
    on_disk, booked, plain = [], [], []
    for n in range(count):
        prepared = _prepared(rundir, scratch, first + n, plan.fingerprint)
        begun = time.perf_counter()
        commit(rundir, spec, prepared)
        committed = time.perf_counter()
        parts.add(prepared.manifest)
        events.add("part_done", stage=spec.name, round=0, part=first + n, seconds=1.0)
        failures.check(parts, finished=False)
        on_disk.append(committed - begun)
        booked.append(time.perf_counter() - committed)
        again = _prepared(rundir, scratch, first + n, plan.fingerprint)
        text = again.manifest.model_dump_json(indent=1)
        folder = rundir.state(spec, 0)
        begun = time.perf_counter()
        for source, target in again.moves:
            os.replace(root / source, root / target)
            fsync((root / target).parent)
        with (folder / "plain").open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "plain", folder / f"part-{first + n:05d}.json")
        fsync(folder)
        plain.append(time.perf_counter() - begun)
    return tuple(1e6 * statistics.median(values) for values in (on_disk, booked, plain))  # type: ignore[return-value]


def _prepared(rundir: RunDir, scratch: Path, index: int, fingerprint: str) -> PreparedPart:
    spec, records, moves = BY_NAME[_STAGE], [], []
    for table in (*spec.writes, "dropped"):
        temporary = scratch / f"{table}.parquet"
        temporary.write_bytes(b"x")
        own = (rundir.table(spec, 0, table) / f"part-{index:05d}.parquet").relative_to(rundir.root).as_posix()
        records.append(FileRecord(path=own, table=table, rows=90, bytes=1, sha256=SHA))
        moves.append((temporary.relative_to(rundir.root).as_posix(), own))
    tallies = [Tally(unit="row", language=x, rows_in=9, kept=6, dropped={"tie": 3}) for x in LANGUAGES]
    manifest = PartManifest(
        stage=spec.name, round=0, index=index, fingerprint=fingerprint, files=records, tallies=tallies
    )
    return PreparedPart(manifest, tuple(moves))


def main() -> int:
    """Measure and print a Markdown table; 1 when an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=200_000)
    parser.add_argument("--commits", type=int, default=2_000, help="commits that are timed (%(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="where the run is made (default: temporary)")
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="driver-", dir=options.folder) as name:
        root = Path(name) / "many"
        finished_run(root, options.parts, (_STAGE,))
        rundir, spec = RunDir(root), BY_NAME[_STAGE]
        folders = [str(rundir.table(spec, 0, table)) for table in (*spec.writes, "dropped")]
        state = rundir.state(spec, 0)
        listed = [*folders, str(state)]
        print(f"{options.parts:,} parts, load {os.getloadavg()[0]:.1f}\n", flush=True)
        print("| what | took | memory | aim | | baseline |\n| --- | ---: | ---: | ---: | --- | --- |", flush=True)

        def line(what: str, found: tuple[float, float], least: tuple[float, float], seconds: float) -> bool:
            met = found[0] <= seconds and found[1] <= 500
            told = f"listing and reading alone {least[0]:.1f} s, {least[1]:.0f} MB"
            verdict = "met" if met else "missed"
            print(
                f"| {what} | {found[0]:.1f} s | {found[1]:.0f} MB | {seconds:g} s, 500 MB | {verdict} | {told} |",
                flush=True,
            )
            return not met

        reading = best(lambda: child(_READ, *folders))
        missed += line("`status`, the run finished", best(lambda: child(_STATUS, str(root))), reading, 3)
        (state / "_stage.json").unlink()
        left = options.parts // 2
        for index in range(left, options.parts):
            (state / f"part-{index:05d}.json").unlink()
        reading = best(lambda: child(_READ, *listed))
        found = best(lambda: child(_PLAN, str(root), str(left)))
        missed += line("planning, half of the stage done", found, reading, 5)
        found = best(lambda: child(_GO_ON, str(root), str(left)))
        print(
            f"| adding up what those parts hold, once the stage goes on | {found[0]:.1f} s | {found[1]:.0f} MB | | | |"
        )
        on_disk, booked, plain = commits(root, left, options.commits)
        met = booked < 1000
        missed += not met
        print(
            f"| a commit, with half of them there | {booked:.0f} µs, and {on_disk:.0f} µs on disk | | 1,000 µs | "
            f"{'met' if met else 'missed'} | the same files by plain calls {plain:.0f} µs |"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
