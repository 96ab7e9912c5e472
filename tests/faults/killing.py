"""Kill whole runs at random instants, resume them with the same command, and compare with an undisturbed run.

`make faults` runs it at length. Every kill is aimed inside a stage, so that short stages are hit as often as long ones:

- time: a moment drawn evenly over the stage's own duration in the undisturbed run (loading included);
- part: shortly after the next part is committed;
- publish: within milliseconds of a file appearing or changing in the run directory, where a commit is in progress.

A kill is SIGKILL to the driver's process group and to its workers' groups at once (a preempted machine), to the driver
alone (its workers must die with it), or to the workers alone (the out-of-memory killer: the driver must go on).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from schemas.config import RunConfig
from schemas.manifests import StageManifest
from stages.catalog import STAGES as ALL_STAGES

START = "start"
_PLAIN = RunConfig.model_validate(
    {"name": "plain", "model": {"policy": "x"}, "languages": {"seen": ["en"]}, "prompts": {"sources": [{"path": "x"}]}}
)
STAGES = tuple(spec for spec in ALL_STAGES if spec.is_part_of(_PLAIN))
"""Of a run without any of the extras."""
TARGETS = (START, *(spec.name for spec in STAGES))
_START_SECONDS = 1.5
_PATIENCE_SECONDS = 900.0
_POLL_SECONDS = 0.001


@dataclass
class Kill:
    """One kill: what was aimed at, what was running when it came, how it was done."""

    aimed: str
    stage: str
    aim: str
    victim: str


@dataclass
class Reference:
    """An undisturbed run: its results, how long every stage took, how many parts it has."""

    results: dict[str, str]
    seconds: dict[str, float]
    parts: int


@dataclass
class Report:
    """What came of one run directory. differences: what is not as in the undisturbed run, empty if all is well."""

    kills: list[Kill] = field(default_factory=list)
    begun: int = 0
    finished_twice: int = 0
    differences: list[str] = field(default_factory=list)


def results(root: Path) -> dict[str, str]:
    """SHA-256 of every table file and of the trained model's weights, by path, and every stage's account."""
    found = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("**/part-*.parquet", "**/train/model/*.safetensors", "**/train/adapter/*.safetensors")
        for path in root.glob(pattern)
        if "_tmp" not in path.parts
    }
    for path in root.rglob("_stage.json"):
        manifest = StageManifest.model_validate_json(path.read_text(encoding="utf-8"))
        account = json.dumps([t.model_dump() for t in manifest.tallies])
        found[f"account of {manifest.stage} (round {manifest.round})"] = account
    return found


def events(root: Path) -> list[dict[str, Any]]:
    """The run's events so far."""
    try:
        lines = (root / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # being written
    return found


def refer(root: Path) -> Reference:
    """Describe an undisturbed, finished run."""
    begun, seconds = {}, {}
    seen = events(root)
    for event in seen:
        if event["event"] == "stage_started":
            begun[event["stage"]] = event["time"]
        if event["event"] == "stage_done":
            seconds[event["stage"]] = event["time"] - begun[event["stage"]]
    return Reference(results(root), seconds, sum(e["event"] == "part_done" for e in seen))


class Harness:
    """Kills runs of one config. seed: of the instants, so that a run of the harness can be repeated (as far as time can)."""

    def __init__(self, config: Path, reference: Reference, seed: int) -> None:
        self._config, self._reference = config, reference
        self._random = random.Random(seed)

    def disturb(self, folder: Path, targets: list[str]) -> Report:
        """One run directory in `folder`: a kill in each of `targets` (in stage order), then run to the end and compare."""
        report, root = Report(), folder / "t"
        left = sorted(targets, key=TARGETS.index)
        while left:
            driver = self._start(folder)
            try:
                kill = self._kill(driver, root, left.pop(0), before=len(events(root)))
            finally:
                _end(driver)
            if kill is not None:
                report.kills.append(kill)
            done = {e["stage"] for e in events(root) if e["event"] == "stage_done"}
            left = [t for t in left if t == START or t not in done] if len(done) < len(STAGES) else []
        driver = self._start(folder)
        _, errors = driver.communicate(timeout=_PATIENCE_SECONDS)
        if driver.returncode:
            report.differences.append(f"the last run ended with {driver.returncode}: {errors[-2000:]}")
        self._compare(root, report)
        return report

    def _compare(self, root: Path, report: Report) -> None:
        got, wanted = results(root), self._reference.results
        for name in sorted(set(got) | set(wanted)):
            if got.get(name) != wanted.get(name):
                what = "is missing" if name not in got else "is too much" if name not in wanted else "differs"
                report.differences.append(f"{name} {what}")
        seen = events(root)
        finished = Counter((e["stage"], e["round"], e["part"]) for e in seen if e["event"] == "part_done")
        report.finished_twice = sum(n - 1 for n in finished.values())
        report.begun = sum(e["event"] == "part_started" for e in seen)

    def _start(self, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline", "run", str(self._config), "--run-dir", str(folder), "--quiet"]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def _kill(self, driver: subprocess.Popen[str], root: Path, target: str, before: int) -> Kill | None:
        """Wait for the instant and kill. None if the run ended first."""
        aim = self._random.choice(("time", "time", "part", "publish"))
        victim = self._random.choice(("group", "group", "driver", "workers"))
        if target == START:
            aim, delay = "time", self._random.uniform(0, _START_SECONDS)
        else:
            if not _wait(driver, root, lambda new: any(_is(e, "stage_started", target) for e in new), before):
                return None
            seconds = self._reference.seconds.get(target, 1.0)
            delay = self._random.uniform(0, seconds if aim == "time" else 0.1)
        limit = time.monotonic() + 2 * self._reference.seconds.get(target, 1.0)
        if aim == "part":
            count = len(events(root))
            _wait(driver, root, lambda new: any(e["event"] == "part_done" for e in new), count, limit)
        if aim == "publish":
            state = _listing(root)
            while driver.poll() is None and _listing(root) == state and time.monotonic() < limit:
                time.sleep(_POLL_SECONDS)
            delay = self._random.uniform(0, 0.004)
        _sleep(driver, root, target, delay, before)
        if driver.poll() is not None:
            return None
        stage = _running(events(root)[before:])
        _strike(driver, victim)
        if victim == "workers":  # the driver goes on with new workers; it is stopped later, at the next kill
            time.sleep(self._random.uniform(0, 4.0))
            _strike(driver, "group")
        return Kill(target, stage, aim, victim)


def _is(event: dict[str, Any], kind: str, stage: str) -> bool:
    return event["event"] == kind and event.get("stage") == stage


def _wait(driver: subprocess.Popen[str], root: Path, condition: Any, before: int, limit: float | None = None) -> bool:
    limit = limit or time.monotonic() + _PATIENCE_SECONDS
    while driver.poll() is None and time.monotonic() < limit:
        if condition(events(root)[before:]):
            return True
        time.sleep(0.02)
    return False


def _sleep(driver: subprocess.Popen[str], root: Path, target: str, seconds: float, before: int) -> None:
    """Wait for the instant, but not beyond the end of the stage that is aimed at."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and driver.poll() is None:
        if any(_is(e, "stage_done", target) for e in events(root)[before:]):
            return
        time.sleep(min(left, 0.02))


def _listing(root: Path) -> list[tuple[str, int]]:
    """Names and sizes of the run directory's files: changes when a file is written, published or removed."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                size = os.stat(path).st_size
            except OSError:
                continue
            if name not in ("events.jsonl", "_lease.json") and not name.endswith(".log"):
                found.append((path, size))
    return sorted(found)


def _running(new: list[dict[str, Any]]) -> str:
    """The stage the driver was in by its last word; `between` two of them, or at its `start`."""
    last = next((e for e in reversed(new) if e["event"] in ("stage_started", "stage_done")), None)
    if last is None:
        return START
    return last["stage"] if last["event"] == "stage_started" else "between"


def _strike(driver: subprocess.Popen[str], victim: str) -> None:
    groups = [] if victim == "driver" else list(_workers(driver))
    if victim != "workers":
        groups.insert(0, driver.pid)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _workers(driver: subprocess.Popen[str]) -> Iterator[int]:
    """Process groups of the driver's children (each worker leads its own)."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            if os.getpgid(child.pid) == child.pid:
                yield child.pid
        except ProcessLookupError:
            continue


def _end(driver: subprocess.Popen[str]) -> None:
    """Leave no process behind, whatever happened."""
    if driver.poll() is None:
        _strike(driver, "group")
    driver.communicate()
