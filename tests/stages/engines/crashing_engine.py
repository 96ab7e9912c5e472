"""An engine that dies on demand, for the child process of a ProcessEngine. What it should do lies in model.path."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.engines.base import Completion, Request, StreamingEngine

POISON, REFUSED, FINE = 666, 7, 1


class CrashingEngine(StreamingEngine):
    """Answers the newest request first, as it has room for max_num_seqs.

    Files in `folder`: starts, asked: what was done; die-after: a number of answers after which the process is killed,
    once; room: the number of requests that memory has room for.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.context_length, self._size = folder, 100, config.engine.max_num_seqs
        self._log("starts", f"{os.getpid()} {self._size}")
        self._answers = 0
        least = folder / "start-room"
        if least.exists() and self._size > int(least.read_text()):
            raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")
        if (folder / "no-such-model").exists():
            raise UserError("vLLM cannot load it")
        taken, silent = folder / "taken", folder / "silent"
        if taken.exists() and int(taken.read_text()):
            taken.write_text(str(int(taken.read_text()) - 1))
            raise ValueError("Free memory on device cuda:0 (3/24 GiB) on startup is less than desired")
        if silent.exists():
            sys.stderr.write(f"(Worker_TP1 pid=7) ERROR 11-30 [multiproc_executor.py:1] {silent.read_text()}\n")
            sys.stderr.flush()
            raise Exception(
                "WorkerProc initialization failed due to an exception in a background process. See stack trace."
            )
        if (folder / "die-at-start").exists():
            os.kill(os.getpid(), signal.SIGSEGV)

    def stream(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        running: list[Request] = []
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < self._size:
                try:
                    request = next(requests)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    break
                self._log("asked", request.id)
                running.append(request)
            if running:
                yield self._answer(running)

    def _answer(self, running: list[Request]) -> Completion:
        room, flag = self.folder / "room", self.folder / "die-after"
        if room.exists() and len(running) > int(room.read_text()):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if any(request.prompt_ids[0] == POISON for request in running):
            os.kill(os.getpid(), signal.SIGKILL)
        if flag.exists() and self._answers >= int(flag.read_text()):
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        request = running.pop()
        self._answers += 1
        if request.prompt_ids[0] == REFUSED:
            return Completion(request.id, "", [], 0, "abort", error="vLLM ended the request: abort")
        return Completion(request.id, f"answer to {request.id}", [1], 1, "stop")

    def close(self) -> None:
        self._log("starts", "closed")

    def _log(self, name: str, line: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(line + "\n")


def load(model: ModelRef, config: RunConfig, ctx: object) -> CrashingEngine:
    assert model.path is not None
    return CrashingEngine(model.path, config)
