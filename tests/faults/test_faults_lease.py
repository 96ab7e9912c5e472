"""One writer per directory: dead holders give way, live ones never, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

import pipeline.lease
from pipeline.lease import Lease, LeaseLost, _process_lives, _started, holder_of
from schemas.errors import UserError


@pytest.fixture
def quick(monkeypatch):
    """A second instead of minutes."""
    monkeypatch.setattr(pipeline.lease, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(pipeline.lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(pipeline.lease, "_POLL_SECONDS", 0.05)


def foreign(root: Path, **changes: object) -> dict:
    """A lease left by another machine."""
    holder = Lease(root)._me | {"host": "elsewhere", "space": "another boot", "nonce": "x", "heartbeat": time.time()}
    (root / "_lease.json").write_text(json.dumps(holder | changes))
    return holder


@pytest.mark.parametrize("heartbeat", [0.0, 1.0, -1e9, 1e9])
def test_a_lease_of_another_machine_is_taken_when_it_stays_still_whatever_its_clock(tmp_path, quick, heartbeat):
    foreign(tmp_path, heartbeat=time.time() + heartbeat)
    said: list[str] = []
    with Lease(tmp_path, said.append) as lease:
        lease.check()
    assert "elsewhere" in said[0] and not (tmp_path / "_lease.json").exists()


@pytest.mark.parametrize("heartbeat", [-1e9, 1e9])
def test_a_living_holder_on_another_machine_is_respected_whatever_its_clock(tmp_path, quick, heartbeat):
    holder = foreign(tmp_path)
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.1):
            beats += 1
            foreign(tmp_path, nonce=holder["nonce"], beat=beats, heartbeat=time.time() + heartbeat)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"Another run is working.*elsewhere"), Lease(tmp_path):
            pass
    finally:
        over.set()
        thread.join()


def test_a_clock_that_jumps_makes_a_living_holder_on_this_machine_neither_dead_nor_immortal(tmp_path, monkeypatch):
    with Lease(tmp_path):
        for jump in (-1e6, 1e6):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
            assert holder_of(tmp_path) is not None
            with pytest.raises(UserError, match="Another run is working"), Lease(tmp_path):
                pass


def test_a_zombie_and_a_reused_process_id_are_dead():
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 30
    while _started(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _started(child.pid) is None, "an ended process whose parent has not waited for it still has its id"
    child.wait()
    assert not _process_lives({"pid": os.getpid(), "started": 1})
    assert _process_lives({"pid": os.getpid(), "started": _started(os.getpid())})


@pytest.fixture
def hidden(monkeypatch):
    """A process id of another user where /proc is mounted with hidepid: it may not be signalled, and nothing is seen of it."""
    pid = 2**22 + 1  # beyond the largest

    def kill(other: int, number: int) -> None:
        assert (other, number) == (pid, 0)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(pipeline.lease.os, "kill", kill)
    return {"host": "here", "space": pipeline.lease._space(), "pid": pid, "started": 7}


def test_a_holder_of_another_user_that_cannot_be_seen_is_watched(tmp_path, quick, hidden):
    foreign(tmp_path, **hidden)
    assert holder_of(tmp_path) is not None
    writing = threading.Timer(0.3, lambda: foreign(tmp_path, **hidden, beat=2))
    writing.start()
    with pytest.raises(UserError, match=r"Another run is working.*here"), Lease(tmp_path):
        pass
    writing.join()
    with Lease(tmp_path) as lease:  # it no longer writes
        lease.check()


@pytest.mark.parametrize("clock", [-1e9, 1e9])
@pytest.mark.parametrize("writes", [True, False])
def test_status_says_of_another_machine_whether_it_lives_whatever_its_clock(tmp_path, quick, clock, writes):
    foreign(tmp_path, heartbeat=time.time() + clock)
    said: list[str] = []
    writing = threading.Timer(0.3, lambda: foreign(tmp_path, heartbeat=time.time() + clock, beat=2))
    if writes:
        writing.start()
    assert (holder_of(tmp_path, said.append) is not None) == writes and "watching" in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "h"}'])
def test_a_torn_lease_is_taken(tmp_path, quick, content):
    (tmp_path / "_lease.json").write_text(content)
    with Lease(tmp_path) as lease:
        lease.check()


def test_a_lease_that_is_just_being_written_is_not_taken(tmp_path, quick):
    path = tmp_path / "_lease.json"
    path.touch()
    holder = Lease(tmp_path)._me
    threading.Timer(0.05, lambda: path.write_text(json.dumps(holder | {"nonce": "y", "heartbeat": 0.0}))).start()
    with pytest.raises(UserError, match="Another run is working"), Lease(tmp_path):
        pass


def test_of_many_takers_of_a_stale_lease_at_most_one_goes_on(tmp_path, quick):
    foreign(tmp_path)
    holders: list[Lease] = []
    refused: list[UserError] = []
    everybody = threading.Barrier(6)

    def take() -> None:
        lease = Lease(tmp_path)
        everybody.wait()
        try:
            lease.__enter__()
        except UserError as error:
            refused.append(error)
        else:
            holders.append(lease)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.5)  # a few heartbeats
    living = []
    for lease in holders:
        try:
            lease.check()
            living.append(lease)
        except LeaseLost:
            continue
    assert len(living) == 1 and len(refused) + len(holders) == 6
    for lease in holders:
        lease.__exit__(None, None, None)


def test_a_run_whose_lease_is_taken_stops_before_it_marks_anything_as_done(fake, monkeypatch):
    """A machine that was suspended wakes up: another has taken its run over."""
    import fake_stages

    real = fake_stages.Squares.run

    def taken_over(self, ctx, shards):
        for part in real(self, ctx, shards):
            foreign(fake.root)
            yield part

    monkeypatch.setattr(fake_stages.Squares, "run", taken_over)
    with pytest.raises(LeaseLost, match=r"no longer holds.*elsewhere"):
        fake()
    assert not (fake.root / "round-0/_state/generate/_stage.json").exists()
    assert json.loads((fake.root / "_lease.json").read_text())["host"] == "elsewhere", "the taker's lease stays"
    events = [json.loads(line)["event"] for line in (fake.root / "events.jsonl").read_text().splitlines()]
    assert "run_ended" not in events and not (fake.root / "report.html").exists(), "they are the taker's"


def test_a_run_whose_directory_is_moved_away_stops(fake, monkeypatch, quick):
    import fake_stages

    def moved(self, ctx):
        fake.root.rename(fake.folder / "elsewhere")
        time.sleep(0.5)
        fake.root.mkdir()
        yield from real(self, ctx)

    real = fake_stages.Numbers.run
    monkeypatch.setattr(fake_stages.Numbers, "run", moved)
    with pytest.raises(LeaseLost, match="moved or cleaned"):
        fake()


def test_a_heartbeat_that_cannot_be_written_ends_the_run(tmp_path, quick, monkeypatch):
    with Lease(tmp_path) as lease:

        def fail() -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(lease, "_write", fail)
        time.sleep(1.2)
        with pytest.raises(LeaseLost, match="heartbeat could not be written"):
            lease.check_heartbeat()
