"""`make faults-ray`: strike nodes, workers and drivers of runs on a real Ray cluster on this machine, and say what was lost.

python -m tests.faults.kills_ray --kills 40 --seed 0

One run after the other on fake stages. Strikes come at random instants while shards are computed: a node is killed (and another joins),
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
_PATIENCE_SECONDS = 300.0


def main() -> int:
    """Strike and compare; 1 if anything was lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console, drawn = Console(width=120, highlight=False), random.Random(arguments.seed)
    os.environ["FAKE_SECONDS"], os.environ["FAKE_STEPS"] = "0.3", "20"
    struck: Counter[str] = Counter()
    wrong = runs = repeated = 0
    with tempfile.TemporaryDirectory(prefix="faults-ray-") as name:
        folder = Path(name)
        wanted = _alone(folder / "alone")
        nodes = ThreeNodes()
        try:
            while struck.total() < arguments.kills:
                run = _Disturbed(nodes, folder / f"run-{runs}", drawn)
                run.to_the_end(arguments.kills - struck.total())
                struck.update(run.struck)
                differs = _tables(run.root) != wanted
                twice = run.committed_twice()
                repeated += run.begun() - len(wanted)
                wrong += differs or twice > 0
                runs += 1
                console.print(
                    f"run {runs}: {run.struck.total()} strikes, {'DIFFERENT' if differs else 'same tables'}, {twice} parts twice"
                )
        finally:
            nodes.close()
    for strike in (*_STRIKES, _TRAINING):
        console.print(f"{strike}: {struck[strike]}")
    console.print(
        f"{struck.total()} strikes in {runs} runs, {wrong} runs differ, {repeated} parts begun again", style="bold"
    )
    return int(wrong > 0)


class _Disturbed:
    """A run and what is done to it."""

    def __init__(self, nodes: ThreeNodes, folder: Path, drawn: random.Random) -> None:
        self._nodes, self._drawn, self.root = nodes, drawn, folder / "runs" / "t"
        self._config = _config(folder)
        self.struck: Counter[str] = Counter()
        self._start()

    def _start(self) -> None:
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

    def begun(self) -> int:
        """Parts that a worker took."""
        return sum(e["event"] == "part_started" for e in self._events())

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
            if self._driver.returncode != 1 or "no longer answers" not in errors:
                raise SystemExit(f"without its head the run ended with {self._driver.returncode}: {errors[-2000:]}")
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
        last = next((e for e in reversed(self._events()) if e["event"] in ("part_done", "run_started", "note")), None)
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
