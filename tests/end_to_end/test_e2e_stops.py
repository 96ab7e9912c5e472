"""A training that a scheduler stops: real signals, real workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml


def progress_of(root: Path, stage: str) -> bool:
    lines = (root / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    begun = max((n for n, e in enumerate(events) if e["event"] == "run_started"), default=0)
    return any(e["event"] == "progress" and e["stage"] == stage and e["done"] for e in events[begun:])


def test_sigterm_to_a_training_leaves_a_checkpoint_of_its_last_step_within_the_grace(whole_run, tmp_path):
    """No checkpoint is due before the end: the one that is there is the stop's. Nothing is left behind, nor complained of."""
    path, whole, _ = whole_run
    root = tmp_path / "runs/t"
    shutil.copytree(whole, root)
    config = yaml.safe_load(path.read_text()) | {"run_dir": str(tmp_path / "runs")}
    config["train"] |= {"max_steps": 300, "save_steps": 10_000}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "config.yaml"), "--until", "train"]
    process = subprocess.Popen(
        [*command, "--force-stage", "train"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 180
        while not progress_of(root, "train"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in members:
            os.kill(member.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "semaphore" not in errors and "Traceback" not in errors and "a worker died" not in errors
    (saved,) = (root / "round-0/train/checkpoints").glob("checkpoint-*")
    step = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert 30 <= step < 300 and saved.name == f"checkpoint-{step}"
    assert not psutil.wait_procs(members[1:], timeout=10)[1]
