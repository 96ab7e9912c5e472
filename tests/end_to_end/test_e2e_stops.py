"""A training that a scheduler stops: a real signal, the real run loop and trainer, in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from stages.train.trainer import PairTrainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_in_training_leaves_its_last_step_and_the_same_command_continues(
    imported_run: Path,
    inline_command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    number: signal.Signals,
) -> None:
    """No checkpoint is due before the end: the one that is there is the stop's."""
    before = signal.signal(number, signal.SIG_DFL)  # of tests that run under nohup or in the background it is ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    root = tmp_path / "mine"
    shutil.copytree(imported_run, root)
    settings = ("--set", "train.max_steps=4", "--set", "train.save_steps=1000", "--run-dir", str(tmp_path))
    command = ("run", str(root / "run.yaml"), *settings, "--until", "train", "--force-stage", "train")
    seen: list[int] = []
    loss = PairTrainer.compute_loss

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.state.global_step)
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", signalled)
    stopped = inline_command(*command, check=False)
    assert stopped.exit_code == 128 + number and number.name in stopped.stderr, stopped.output
    assert seen == [0, 1]
    assert [path.name for path in (root / "round-0/train/checkpoints").iterdir()] == ["checkpoint-2"]
    inline_command(*command)
    assert seen == [0, 1, 2, 3], "what was trained is not trained again"
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "note" and event["message"] == "resuming from checkpoint-2" for event in events)
