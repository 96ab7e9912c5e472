"""What a shard costs more on a Ray cluster than on this machine alone, in one run of this program.

python -m benchmarks.ray_overhead --shards 400

A stage that does nothing, by two workers: processes of this machine, then a real cluster on it (a head, two nodes with a core each). A shard's
time is that between commits, so that starting workers does not count; medians of `--repeats` runs each, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console

from tests.cluster_support import ThreeNodes, start_driver


def main() -> None:
    """Measure and print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["FAKE_SECONDS"] = "0"
    nodes = ThreeNodes()
    found: dict[str, list[float]] = {"local": [], "ray": []}
    try:
        with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
            for number in range(arguments.repeats):
                for on, more in (
                    ("local", ["execution.workers=2"]),
                    ("ray", [f"execution.ray_address={nodes.address}"]),
                ):
                    root = Path(folder) / f"{on}-{number}"
                    found[on].append(_milliseconds(root, arguments.shards, [f"execution.on={on}", *more]))
    finally:
        nodes.close()
    local, ray = median(found["local"]), median(found["ray"])
    Console(highlight=False).print(
        f"a shard: {local:.2f} ms on this machine, {ray:.2f} ms on Ray ({ray - local:+.2f} ms, ratio {ray / local:.2f});"
        f" all runs, ms: {found}"
    )


def _milliseconds(folder: Path, shards: int, overrides: list[str]) -> float:
    """Between the first commit of the generate stage and its last, a shard."""
    folder.mkdir()
    config = folder / "config.yaml"
    settings = {
        "name": "t",
        "run_dir": str(folder / "runs"),
        "languages": {"seen": ["en", "de"]},
        "model": {"policy": "x"},
        "prompts": {"sources": [{"path": "x"}], "max_chars": shards},
        "generate": {"shard_size": 1},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    driver = start_driver(config, *overrides)
    _, errors = driver.communicate(timeout=600)
    if driver.returncode:
        raise SystemExit(errors)
    lines = (folder / "runs" / "t" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [
        event for event in map(json.loads, lines) if event["event"] == "part_done" and event["stage"] == "generate"
    ]
    times = [event["time"] for event in events]
    return float(times[-1] - times[0]) * 1000 / (len(times) - 1)


if __name__ == "__main__":
    main()
