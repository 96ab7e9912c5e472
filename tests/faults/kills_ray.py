"""`make faults-ray`: strike nodes, workers and drivers of runs on a real Ray cluster on this machine, and say what was lost.

python -m tests.faults.kills_ray --kills 40 --seed 0
python -m tests.faults.kills_ray --kills 40 --kept strikes.jsonl --minutes 10    # in pieces: the same command goes on

One run after the other on fake stages, some strikes each. They come at random instants while shards are computed: a node is killed (and another joins),
a node hangs beyond Ray's health check and comes back, a worker process is killed, the driver is killed, the head is killed (the run must end
in words, and the same command continue on a new cluster), a node is added; and a node dies of those that train together.
Every run must end with the tables of an undisturbed run on this machine, and no part may be committed twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml
from rich.console import Console

from tests.cluster_support import ThreeNodes, start_driver

_CONFIG = {
    "name": "t",
    "languages": {"seen": ["en", "de"]},
    "model": {"policy": "x"},
    "prompts": {"sources": [{"path": "x"}], "max_chars": 120},
    "generate": {"shard_size": 1},
}
_STRIKES = ("node killed", "node silent, then back", "worker killed", "driver killed", "node added", "head killed")
_TRAINING = "node killed in training"
_A_RUN = 6
_PATIENCE_SECONDS = 300.0


def main() -> int:
    """Strike and compare; 1 if anything was lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kept", type=Path, help="a line a finished run: those that are there count, and are not done again"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no other run begins")
    arguments = parser.parse_args()
    console = Console(width=120, highlight=False)
    os.environ["FAKE_SECONDS"], os.environ["FAKE_STEPS"] = "0.3", "20"
    found = _Found(arguments.kept)
    until = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="faults-ray-") as name:
        folder = Path(name)
        wanted = _alone(folder / "alone")
        nodes = ThreeNodes()
        try:
            while found.strikes < arguments.kills and time.monotonic() < until:
                number = len(found.runs)
                run = _Disturbed(nodes, folder / f"run-{number}", random.Random(f"{arguments.seed} {number}"))
                run.to_the_end(min(_A_RUN, arguments.kills - found.strikes))
                found.add(run, wanted)
                console.print(f"run {number + 1}: {found.runs[-1]}")
        finally:
            nodes.close()
    found.print(console)
    return int(found.wrong > 0)


class _Found:
    """What was found in each run, kept in a file where one is named."""

    def __init__(self, kept: Path | None) -> None:
        self._kept = kept
        there = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
        self.runs: list[dict] = [json.loads(line) for line in there]

    def add(self, run: _Disturbed, wanted: dict[str, bytes]) -> None:
        same = _tables(run.root) == wanted
        self.runs.append(
            {"struck": run.struck, "same": same, "twice": run.committed_twice(), "again": run.begun_again()}
        )
        if self._kept:
            with self._kept.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.runs[-1]) + "\n")

    @property
    def strikes(self) -> int:
        return sum(sum(run["struck"].values()) for run in self.runs)

    @property
    def wrong(self) -> int:
        return sum(not run["same"] or run["twice"] > 0 for run in self.runs)

    def print(self, console: Console) -> None:
        for strike in (*_STRIKES, _TRAINING):
            console.print(f"{strike}: {sum(run['struck'].get(strike, 0) for run in self.runs)}")
        again = sum(run["again"] for run in self.runs)
        console.print(
            f"{self.strikes} strikes in {len(self.runs)} runs, {self.wrong} runs differ or committed a part twice, {again} parts begun again",
            style="bold",
        )


class _Disturbed:
    """A run and what is done to it."""

    def __init__(self, nodes: ThreeNodes, folder: Path, drawn: random.Random) -> None:
        self._nodes, self._drawn, self.root = nodes, drawn, folder / "runs" / "t"
        self._config = _config(folder)
        self.struck: Counter[str] = Counter()
        self._start()

    def _start(self) -> None:
        self._before = len(self._events())
        on = ("execution.on=ray", f"execution.ray_address={self._nodes.address}", "train.nodes=0")
        self._driver = start_driver(self._config, *on)

    def to_the_end(self, most: int) -> None:
        """Strike while it computes, `most` times at most."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._driver.poll() is None and time.monotonic() < deadline:
            if self.struck.total() < most and self._computes():
                time.sleep(self._drawn.uniform(0, 0.6))
                self._strike(self._drawn.choice(_STRIKES))
            elif self.struck.total() < most and not self.struck[_TRAINING] and self._trains():
                self._lose(self._drawn.choice(list(self._nodes.nodes)))
                self.struck[_TRAINING] += 1
            time.sleep(0.2)
        _, errors = self._driver.communicate(timeout=60)
        if self._driver.returncode:
            raise SystemExit(f"the run ended with {self._driver.returncode}: {errors[-2000:]}")

    def committed_twice(self) -> int:
        """Parts that were committed again though they were there."""
        done = Counter((e["stage"], e["part"]) for e in self._events() if e["event"] == "part_done")
        return sum(n - 1 for n in done.values())

    def begun_again(self) -> int:
        """Parts that a worker took after another had."""
        begun = Counter((e["stage"], e["part"]) for e in self._events() if e["event"] == "part_started")
        return sum(n - 1 for n in begun.values())

    def _strike(self, what: str) -> None:
        names = [name for name in self._nodes.nodes if self._nodes.processes(name)]
        name = self._drawn.choice(names)
        if what == "node killed":
            self._lose(name)
        elif what == "node added":
            if len(names) > 3:  # one goes for it
                self._lose(name)
            self._nodes.add(f"n{time.monotonic_ns()}")
        elif what == "head killed":
            self._nodes.lose_head()
            _, errors = self._driver.communicate(timeout=_PATIENCE_SECONDS)
            last = self._events()[-1]
            told = "Ray cluster" in errors and "the same command continues" in errors and len(errors.splitlines()) == 1
            if (self._driver.returncode, last["event"], last.get("exit_code")) != (1, "run_ended", 1) or not told:
                raise SystemExit(
                    f"without its head the run ended with {self._driver.returncode}, {last}: {errors[-2000:]}"
                )
            self._nodes.renew()
            self._start()
        elif what == "node silent, then back":
            self._nodes.strike(name, signal.SIGSTOP)
            time.sleep(6.0)
            self._nodes.strike(name, signal.SIGCONT)
            del self._nodes.nodes[name]  # Ray declared it dead: its raylet ends
            self._nodes.add(f"n{time.monotonic_ns()}")
        elif what == "worker killed":
            workers = [p for p in self._nodes.processes(name) if _is_worker(p)]
            if not workers:
                return
            workers[0].kill()
        else:
            self._driver.kill()
            self._driver.communicate()
            self._start()
        self.struck[what] += 1

    def _lose(self, name: str) -> None:
        """A node, for which another comes."""
        self._nodes.strike(name, signal.SIGKILL)
        del self._nodes.nodes[name]
        self._nodes.add(f"n{time.monotonic_ns()}")

    def _trains(self) -> bool:
        """Whether processes train together and have taken steps."""
        checkpoint = self.root / "round-0" / "train" / "checkpoint"
        return checkpoint.is_file() and checkpoint.read_text().isdigit()

    def _computes(self) -> bool:
        """Whether a shard is being computed; after a strike, that one was committed since."""
        news = self._events()[self._before :]  # of this driver: one that still connects is not struck
        last = next((e for e in reversed(news) if e["event"] in ("part_done", "run_started", "note")), None)
        return last is not None and last["event"] == "part_done" and last["stage"] == "generate"

    def _events(self) -> list[dict]:
        path = self.root / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.spawn" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _config(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(_CONFIG | {"run_dir": str(folder / "runs")}), encoding="utf-8")
    return path


def _tables(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.parquet")) if "_tmp" not in p.parts}


def _alone(folder: Path) -> dict[str, bytes]:
    """What an undisturbed run on this machine writes."""
    driver = start_driver(_config(folder), "execution.workers=2")
    _, errors = driver.communicate(timeout=_PATIENCE_SECONDS)
    if driver.returncode:
        raise SystemExit(errors)
    return _tables(folder / "runs" / "t")


if __name__ == "__main__":
    sys.exit(main())
