"""Child processes: what they say is heard, their deaths are named, and nothing they started outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from stages.children import ChildDied, start_child, wait_for


def say_and_end(connection: Connection, words: list[str], code: int) -> None:
    for word in words:
        connection.send(word)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def start_another(connection: Connection) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    connection.send(process.pid)
    time.sleep(600)


def echo(connection: Connection, variable: str) -> None:
    connection.send(os.environ.get(variable))
    connection.send(connection.recv())


def die_with_a_bar(connection: Connection) -> None:
    from tqdm.auto import tqdm

    for _ in tqdm([1]):
        os.kill(os.getpid(), signal.SIGKILL)


SHOWS_A_BAR = """
from stages.children import start_child, wait_for
from tests.stages.test_children import die_with_a_bar, everything
if __name__ == "__main__":
    print(everything(start_child(die_with_a_bar, (), "child"))[1])
"""


def test_a_killed_child_leaves_no_semaphore_to_be_warned_of(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(SHOWS_A_BAR)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    assert "SIGKILL" in done.stdout, done.stderr
    assert "leaked" not in done.stderr and "semaphore" not in done.stderr


def everything(child) -> tuple[list[str], ChildDied]:
    said: list[str] = []
    while True:
        wait_for([child], 30)
        try:
            for word in child.messages():
                said.append(word)
        except ChildDied as death:
            return said, death


@pytest.mark.parametrize(
    ("code", "cause", "killed"),
    [
        (0, "exit code 0", False),
        (3, "exit code 3", False),
        (-signal.SIGKILL, "signal 9 (SIGKILL), most often the system was out of memory", True),
        (-signal.SIGSEGV, "signal 11 (SIGSEGV)", False),
    ],
)
def test_all_it_said_is_heard_and_then_what_it_died_of(code, cause, killed):
    child = start_child(say_and_end, (["a", "b", "c"], code), "child")
    said, death = everything(child)
    child.kill()
    assert said == ["a", "b", "c"]
    assert (death.cause, death.killed) == (cause, killed)


def test_what_it_started_is_ended_with_it():
    child = start_child(start_another, (), "child", leads=True)
    other = psutil.Process(child.receive())
    child.kill()
    assert not psutil.wait_procs([other], timeout=10)[1] or other.status() == psutil.STATUS_ZOMBIE


def test_it_is_given_an_environment_and_ours_stays_as_it_was():
    child = start_child(echo, ("CHILD_TEST",), "child", environment={"CHILD_TEST": "given"})
    assert child.receive() == "given" and "CHILD_TEST" not in os.environ
    child.send("word")
    assert child.receive() == "word"
    child.end(10)
    with pytest.raises(ChildDied):
        child.send("again")
