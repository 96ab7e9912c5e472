"""Preemption, Ctrl-C, the out-of-memory killer: on a real driver with real workers and fake stages."""

from __future__ import annotations

import json
import os
import pty
import signal
import time

import psutil
import pytest

from pipeline.signals import StopSignals
from tests.crews import over_both_crews


def wait_for(run, event: str, stage: str = "generate", count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len([e for e in seen(run) if e["event"] == event and e.get("stage") == stage]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {event} of {stage}: {seen(run)}")


def wait_for_file(path) -> None:
    """A worker that is in the midst of a shard leaves it: one that was only given a shard may still stop before it."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)


def seen(run) -> list[dict]:
    path = run.root / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def done_parts(run) -> int:
    return len(list((run.root / "round-0/_state/generate").glob("part-*.json")))


def finish(fake_process) -> None:
    process, run = fake_process()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    squares = sorted(json.dumps(r) for r in _column(run))
    assert squares == sorted(json.dumps(n * n) for n in range(0, 12, 2))


def _column(run) -> list[int]:
    import polars as pl

    return pl.read_parquet(run.root / "round-0/candidates/*.parquet")["n_tokens"].to_list()


@pytest.mark.parametrize(
    ("crew", "number", "code"),
    [("local", signal.SIGTERM, 143), ("local", signal.SIGINT, 130), ("ray", signal.SIGTERM, 143)],
)
def test_asked_to_stop_the_shard_is_finished_and_the_exit_code_is_the_signals(fake_process, tmp_path, number, code):
    process, run = fake_process(FAKE_SECONDS="1", FAKE_DIR=str(tmp_path))
    wait_for_file(tmp_path / "at-1")
    for victim in (process, *psutil.Process(process.pid).children(recursive=True)):
        os.kill(victim.pid, number)  # a scheduler signals every process of the job
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "stopping at the next safe point" in errors and "same command continues" in errors
    assert "a worker died" not in errors and "Traceback" not in errors
    assert done_parts(run) == 2, "the shard that was running when the signal came is finished"
    assert seen(run)[-1]["event"] == "run_ended" and signal.Signals(number).name in seen(run)[-1]["error"]
    assert not (run.root / "_lease.json").exists()
    finish(fake_process)


@over_both_crews
def test_a_shard_longer_than_the_grace_time_is_abandoned(fake_process):
    process, run = fake_process("--set", "execution.grace_seconds=1", FAKE_SECONDS="600")
    wait_for(run, "part_started")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - begun < 30 and done_parts(run) == 0
    assert not psutil.wait_procs(workers, timeout=10)[1]
    finish(fake_process)


@over_both_crews
def test_ctrl_c_twice_stops_now(fake_process):
    process, run = fake_process("--set", "execution.grace_seconds=300", FAKE_SECONDS="600")
    wait_for(run, "part_started")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors and "semaphore" not in errors
    assert not psutil.wait_procs(workers, timeout=10)[1]


@over_both_crews
def test_a_terminal_that_is_closed_is_a_stop_like_any_other(fake_process, tmp_path):
    """A real one: the run is in the foreground of a pseudo-terminal, whose other end closes; nobody is left to be told."""
    command, run = fake_process.command, fake_process.run
    environment = os.environ | fake_process.environment | {"FAKE_SECONDS": "1", "FAKE_DIR": str(tmp_path)}
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # of tests that run under nohup it is ignored
        os.execvpe(command[0], command, environment)
    wait_for_file(tmp_path / "at-1")
    assert os.read(terminal, 1), "the bar is shown on it"
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    last = seen(run)[-1]
    assert last["event"] == "run_ended" and last["kind"] == "stopped" and "SIGHUP" in last["error"]
    assert done_parts(run) == 2 and not (run.root / "_lease.json").exists()


def test_a_signal_before_any_stage_runs_stops_at_once():
    from pipeline.executor_errors import Interrupted

    before = signal.getsignal(signal.SIGTERM)  # Ray's, where a test before this one joined a cluster
    with StopSignals() as signals, pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
    assert signals.asked == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@over_both_crews
def test_a_worker_killed_alone_is_replaced(fake_process):
    process, run = fake_process(FAKE_SECONDS="1")
    wait_for(run, "part_done")
    for child in psutil.Process(process.pid).children(recursive=True):
        if os.getpgid(child.pid) == child.pid and not child.children():  # the client of a cluster has them
            child.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker died (signal 9 (SIGKILL), most often the system was out of memory" in errors
    assert sorted(_column(run)) == [n * n for n in range(0, 12, 2)]
    finished = [e["part"] for e in seen(run) if e["event"] == "part_done" and e["stage"] == "generate"]
    assert sorted(finished) == [0, 1, 2, 3], "what was committed is not made again"
