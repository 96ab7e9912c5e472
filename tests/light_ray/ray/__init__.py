"""A stand-in for Ray in one process, for tests of what our own side makes of deaths, signals and silence: two nodes with a core each, an actor
is an object with a thread for each of its concurrency groups, and waits for a node with room. The workers that it hosts are real processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from ray import exceptions, util

__all__ = ["exceptions", "get", "get_runtime_context", "init", "kill", "nodes", "remote", "shutdown", "util", "wait"]

_NODES = ("a", "b")
_free = list(_NODES)
_room = threading.Condition()
_here = threading.local()


def init(**_: Any) -> None: ...


def shutdown() -> None: ...


def nodes() -> list[dict[str, Any]]:
    common = {
        "Alive": True,
        "NodeManagerAddress": "127.0.0.1",
        "NodeManagerHostname": "here",
        "Resources": {"CPU": 1.0},
    }
    return [common | {"NodeID": name, "NodeName": f"node-{name}"} for name in _NODES]


def get_runtime_context() -> Any:
    return SimpleNamespace(get_node_id=lambda: _here.node, get_accelerator_ids=dict)


def remote(*given: Any, **_: Any) -> Any:
    """`remote(function)`, or `remote(num_cpus=...)(Class)`."""
    return _Task(given[0]) if given else lambda kind: SimpleNamespace(remote=lambda *arguments: _Actor(kind, arguments))


def wait(references: Sequence[Future[Any]], num_returns: int = 1, timeout: float | None = None) -> tuple[list, list]:
    when = FIRST_COMPLETED if num_returns == 1 else ALL_COMPLETED
    done, rest = wait_for_futures(references, timeout, when)
    return list(done), list(rest)


def get(reference: Future[Any], timeout: float | None = None) -> Any:
    return reference.result(timeout)


def kill(actor: _Actor) -> None:
    actor.end()


class _Task:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **_: Any) -> _Task:
        return self

    def remote(self, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(self._function(*arguments))
        return done


class _Actor:
    def __init__(self, kind: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._groups: dict[str, SimpleQueue[Any]] = {}
        self._node, self._ended = "", False
        self._made: Future[Any] = Future()
        threading.Thread(target=self._make, args=(kind, arguments), daemon=True).start()

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Future[Any]:
            said: Future[Any] = Future()
            if method not in self._groups:
                self._groups[method] = SimpleQueue()
                threading.Thread(target=self._carry_out, args=(method,), daemon=True).start()
            self._groups[method].put((said, arguments))
            return said

        bound = SimpleNamespace(remote=call)
        return SimpleNamespace(options=lambda **_: bound)

    def end(self) -> None:
        with _room:
            self._ended = True
            if self._node:
                _free.append(self._node)
            _room.notify_all()

    def _carry_out(self, method: str) -> None:
        made = self._made.result()
        while True:
            said, arguments = self._groups[method].get()
            said.set_result(getattr(made, method)(*arguments))

    def _make(self, kind: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        with _room:
            _room.wait_for(lambda: _free or self._ended)
            if self._ended:
                return
            self._node = _here.node = _free.pop(0)
        self._made.set_result(kind(*arguments))
