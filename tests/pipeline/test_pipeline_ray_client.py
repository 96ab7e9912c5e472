"""The process that is Ray's client: whatever becomes of it, the driver has one paragraph. No Ray."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import pipeline.ray_client
from pipeline.cluster import AGAIN, ClusterLost
from pipeline.cluster_crew import ClusterMember, refuse_unreachable
from pipeline.doctor_cluster import cluster_findings
from pipeline.executor_errors import ending
from pipeline.messages import Leave
from pipeline.ray_client import ClientFailed, RayClient, _Alive, _Answer
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.catalog import BY_NAME
from tests.crews import LIGHT_RAY


class Fake:
    """Lives in the client's process; lost once it was told so."""

    def __init__(self, ok: bool = True) -> None:
        if not ok:
            raise UserError("no such cluster", where="execution.ray_address")
        self._lost = False

    def check_lives(self) -> None:
        if self._lost:
            raise ClusterLost("The Ray cluster no longer answers (nothing for 20 s)", where="head:1", fix=AGAIN)

    def double(self, number: int) -> int:
        if number < 0:
            raise UserError("too small")
        sys.stdout.write("a word of Ray's\n")
        return 2 * number

    def end(self, number: int) -> None:
        """As Ray ends its client: with an exit code, or by a signal."""
        if number < 0:
            os.kill(os.getpid(), -number)
        os._exit(number)

    def trip(self, words: str) -> None:
        """A call in which something breaks that nobody foresaw."""
        raise KeyError(words) if not words else RuntimeError(words)

    def unsendable(self) -> object:
        return lambda: None

    def break_guard(self) -> None:
        self.check_lives = None  # type: ignore[method-assign, assignment]
        time.sleep(600)

    def lose_head(self) -> None:
        """A call that Ray does not come back from."""
        self._lost = True
        time.sleep(600)

    def close(self) -> None: ...


@pytest.fixture
def client(tmp_path):
    found = RayClient(Fake, (), tmp_path / "logs" / "ray.log")
    yield found
    found.close()


def test_what_lives_in_the_client_is_called_and_its_refusals_are_raised_here(client, tmp_path, capfd):
    assert [client.call(Fake.double, number) for number in (1, 2)] == [2, 4]
    with pytest.raises(UserError, match="too small"):
        client.call(Fake.double, -1)
    assert client.call(Fake.double, 3) == 6
    client.close()  # which writes what is left
    assert "a word of Ray's" in (tmp_path / "logs" / "ray.log").read_text() and not capfd.readouterr().out
    with pytest.raises(UserError, match="no such cluster"):
        RayClient(Fake, (False,), tmp_path / "ray.log")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ((Fake.end, 1), r"its client ended: exit code 1\) \(.*ray\.log\)"),
        ((Fake.end, -signal.SIGABRT), r"its client ended: signal 6 \(SIGABRT\)"),
        ((Fake.lose_head,), r"nothing for 20 s\) \(head:1\)"),
    ],
)
def test_whatever_ends_the_client_is_one_paragraph_and_what_comes_after_is_not_waited_for(client, end, words):
    with pytest.raises(ClusterLost, match=rf"no longer answers \({words}.*the same command continues"):
        client.call(*end)
    with pytest.raises(ClusterLost):
        client.call(Fake.double, 1)
    member = ClusterMember(client, 0, Path("worker.log"))  # one that the pool dismisses then
    member.send(Leave())
    member.end(1.0)
    member.kill()
    client.close()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ((Fake.trip, "first\nsecond"), "RuntimeError: first"),
        ((Fake.trip, ""), "KeyError: ''"),
        ((Fake.unsendable,), "[A-Za-z]*Error: Can't pickle.*"),
        ((Fake.break_guard,), "TypeError: 'NoneType' object is not callable"),
    ],
)
def test_what_breaks_in_the_client_is_said_and_is_not_the_cluster_lost(client, tmp_path, call, words):
    log = tmp_path / "logs" / "ray.log"
    with pytest.raises(
        ClientFailed, match=rf"^Ray's client broke: {words} \(log: {log}\)\. .*same command continues"
    ) as first:
        client.call(*call)
    assert "Traceback" in first.value.trace and first.value.trace.strip().splitlines()[-1] in log.read_text()
    assert ending(first.value) | {"error": ""} == {"ok": False, "error": "", "kind": "defect", "exit_code": 2}
    member = ClusterMember(client, 0, Path("worker.log"))
    member.send(Leave())
    member.kill()
    with pytest.raises(ClientFailed) as again:  # of the next wait, whatever was not heard before
        client.call(Fake.double, 1)
    assert again.value is first.value


def test_what_breaks_while_the_client_is_made_is_said_too(tmp_path):
    with pytest.raises(ClientFailed, match=r"broke: TypeError: .*ray\.log"):
        RayClient(Fake, (True, "too many"), tmp_path / "ray.log")
    with pytest.raises(ClientFailed, match=r"broke: TypeError: .*\(it wrote no log\)"):
        RayClient(Fake, (True, "too many"), Path(os.devnull))


def test_a_client_that_says_nothing_at_all_is_not_waited_for_for_ever(client, monkeypatch):
    monkeypatch.setattr(pipeline.ray_client, "_ANSWER_SECONDS", 0.2)
    with pytest.raises(ClusterLost, match="silence of 0 s"):
        client.call(time_out)


def time_out(fake: Fake) -> None:
    time.sleep(600)


def test_a_call_that_takes_long_is_waited_for_as_long_as_the_guard_lives(client, monkeypatch):
    """The hash of a part of 140 GB. Silence is counted from the last sign of life."""
    assert client.call(slow) == "done" and client.call(Fake.double, 4) == 8
    now, words = [0.0], [_Alive(), _Alive(), _Answer("hashed")]

    def wait_for(_: object, seconds: float) -> None:
        now[0] += 0.7 * seconds

    monkeypatch.setattr(pipeline.ray_client, "wait_for", wait_for)
    monkeypatch.setattr(pipeline.ray_client.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(client._child, "receive", lambda: words.pop(0))
    assert client._answered() == "hashed" and not words
    words += [_Alive() for _ in range(200)]
    with pytest.raises(ClusterLost, match="no answer in 6 h"):
        client._answered()
    assert words


def slow(fake: Fake) -> str:
    time.sleep(1.5)
    return "done"


def test_a_signal_in_the_midst_of_a_call_ends_the_client_whose_words_would_be_half_read(client):
    class Asked(BaseException): ...

    def handle(*_: object) -> None:
        raise Asked

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Asked):
            client.call(time_out)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ClusterLost):
        client.call(Fake.double, 1)


def test_doctor_says_what_each_node_is_and_a_dry_run_refuses_more_nodes_than_there_are(tmp_path, monkeypatch):
    """Both through a client of their own, which leaves nothing in the run directory."""
    monkeypatch.syspath_prepend(LIGHT_RAY)
    config = RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": str(tmp_path),
            "languages": {"seen": ["en"]},
            "model": {"policy": "x"},
            "prompts": {"sources": [{"path": "x"}]},
            "train": {"nodes": 3},
            "execution": {"on": "ray"},
        }
    )
    *nodes, total = cluster_findings(config)
    assert [finding.what.partition(":")[0] for finding in nodes] == ["node-a", "node-b"]
    assert total.values == {"nodes": 2, "gpus": 0, "workers": 2}
    with pytest.raises(UserError, match=r"to run on 3 nodes and 2 of the Ray cluster can take part"):
        refuse_unreachable(config, [BY_NAME["train"]])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
