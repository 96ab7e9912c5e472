"""An engine in a process of its own: a crash there costs a restart and the requests in flight, not the stage.

GPU memory is only sure to come back when a process ends, so running out of memory is answered the same way: the process
is ended and started again with half of engine.max_num_seqs. Finished answers are here already and are never asked again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

from schemas.errors import UserError
from stages.children import Child, ChildDied, start_child
from stages.contract import Context, ModelRef, Stopped
from stages.engines.base import Completion, Engine, Load, Request, refused_by_length
from stages.engines.child import END, EngineDied, main
from stages.text.render import Renderer

_SIZE = "engine.max_num_seqs"
_BUSY_SECONDS = 20.0
"""Between starts on a device whose memory others have."""
_POLL_SECONDS = 0.2
_MAX_FRUITLESS = 12
"""Deaths in a row without one answer. Finding one bad request among 768 takes about 7."""
_CLOSE_SECONDS = 20.0


class ProcessEngine(Engine):
    """Runs `load` in a child process; see `stages.engines.base.Engine`.

    When the child dies, the requests in flight are asked again by its successor: all of them the first time, then fewer
    at a time, until the one that brings it down is alone; after execution.max_tries it gets a completion with
    finish_reason error, as does a request that the engine itself ends with an error that often.
    Raises UserError when the model cannot be loaded, or the engine keeps dying without answering anything.
    """

    def __init__(self, load: Load, ctx: Context, model: ModelRef, renderer: Renderer) -> None:
        self.renderer = renderer
        self._load, self._ctx, self._model = load, ctx, model
        self._max_tries = ctx.config.execution.max_tries
        self._child: Child | None = None
        self._fruitless, self._loading = 0, True
        self.context_length = self._room = 0
        self._start()

    @property
    def pid(self) -> int | None:
        """The engine's process, if it runs."""
        return self._child.pid if self._child else None

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """See `Engine.stream`."""
        running: dict[str, Request] = {}
        again: deque[Request] = deque()
        tries: Counter[str] = Counter()
        suspects: set[str] = (
            set()
        )  # in flight at a death and not answered since: only they are asked until none is left
        few, exhausted, ended = 0, False, False
        try:
            while running or again or not exhausted:
                few = few if suspects else 0
                try:
                    if self._child is None:
                        self._start()
                    while len(running) < (few or self._room) and (again or not (exhausted or suspects)):
                        request = again.popleft() if again else next(requests, None)
                        if request is None:
                            exhausted = True
                        elif (problem := refused_by_length(request, self.context_length)) is not None:
                            yield problem
                        else:
                            running[request.id] = request
                            self._send(request)
                    if not running:
                        continue
                    answer = self._receive()
                except EngineDied as death:
                    self._bury(death, len(running))
                    tries.update(running.keys())
                    if len(running) == 1 and max(tries[name] for name in running) >= self._max_tries:
                        guilty = running.popitem()[0]
                        suspects.discard(guilty)
                        yield self._given_up(guilty, death.why)
                    elif any(tries[name] > 1 for name in running):
                        few = max(1, len(running) // 4)
                    suspects.update(running)
                    again.extendleft(reversed(running.values()))
                    running.clear()
                    continue
                request = running.pop(answer.id)
                suspects.discard(answer.id)
                if answer.finish_reason in ("stop", "length"):
                    self._fruitless = 0
                    yield answer
                elif (failures := tries[request.id] + 1) < self._max_tries:
                    tries[request.id] = failures
                    again.append(request)
                else:
                    yield self._given_up(request.id, answer.error)
            ended = True
        finally:
            if ended:
                self._finish_stream()
            else:
                self._kill()  # whoever read the answers is gone: the requests in flight are of no use

    def close(self) -> None:
        """End the process; all its memory is given back."""
        if self._child is not None:
            with suppress(ChildDied):
                self._child.send(None)
            self._child.end(_CLOSE_SECONDS)
            self._child = None

    def _given_up(self, name: str, why: str) -> Completion:
        return Completion(name, "", [], 0, "error", error=f"failed {self._max_tries} times, the last time: {why}")

    def _bury(self, death: EngineDied, asked: int) -> None:
        """After a death: say what happens next, or that it happens too often."""
        self._kill()
        self._fruitless += 1
        if self._fruitless >= _MAX_FRUITLESS:
            raise UserError(
                f"The inference engine of {self._model.name} died {self._fruitless} times without answering anything in "
                f"between; the last time: {death.why}",
                where="engine",
                fix="The worker's log has its last words. Fewer engine.max_num_seqs need less memory; engine.kind: "
                "transformers is slower and simpler. Nothing that was finished is lost: the same command continues.",
            )
        if death.memory:
            self._shrink(death.why)
        many = f"; {asked} requests are asked again" if asked else ""
        self._ctx.progress.note(f"the inference engine died ({death.why}): starting it again{many}")

    def _shrink(self, why: str) -> None:
        size = self._ctx.limited(_SIZE, self._ctx.config.engine.max_num_seqs)
        if size > 1:
            self._ctx.limit(_SIZE, size // 2, why)

    def _start(self) -> None:
        """Start the process and wait until the model is loaded. Raises UserError when it cannot be."""
        for attempt in count(1):
            size = self._ctx.limited(_SIZE, self._ctx.config.engine.max_num_seqs)
            engine = self._ctx.config.engine.model_copy(update={"max_num_seqs": size})
            config = self._ctx.config.model_copy(update={"engine": engine})
            self._child = start_child(main, (self._load, self._model, config), "congrad-engine")
            self._loading = True
            try:
                self.context_length, self._room, self.labels = self._receive()
                self._loading = False
            except EngineDied as death:
                self._kill()
                if attempt >= death.starts or (death.memory and size == 1):
                    raise UserError(
                        f"The inference engine cannot start with {self._model.name}: {death.why}",
                        where="engine",
                        fix="Give it more room (engine.gpu_memory_utilization, engine.cpu_kv_cache_gib), ask for less "
                        "(text.max_length), spread the model over GPUs (engine.tensor_parallel), or free the device.",
                    ) from death
                if death.memory:
                    self._shrink(death.why)
                elif death.busy:
                    wait = f"once more in {_BUSY_SECONDS:.0f} s"
                    self._ctx.progress.note(f"the inference engine finds its device taken ({death.why}): {wait}")
                    self._wait(_BUSY_SECONDS)
                else:
                    self._ctx.progress.note(f"the inference engine died while it started ({death.why}): once more")
            except UserError:
                self._kill()
                raise
            else:
                return

    def _wait(self, seconds: float) -> None:
        """Let time pass. Raises Stopped when the run is asked to stop meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._ctx.stop():
                raise Stopped
            time.sleep(_POLL_SECONDS)

    def _send(self, request: Request) -> None:
        assert self._child is not None
        try:
            self._child.send(request)
        except ChildDied as death:
            raise self._of(death) from None

    def _receive(self) -> Any:
        """The child's next message. Raises EngineDied, or the UserError that the child raised."""
        assert self._child is not None
        try:
            message = self._child.receive()
        except ChildDied as death:
            raise self._of(death) from None
        if isinstance(message, Exception):
            raise message
        return message

    def _of(self, death: ChildDied) -> EngineDied:
        return EngineDied(
            f"its process ended by {death.cause}", death.killed and (self._loading or self._fruitless > 0)
        )

    def _finish_stream(self) -> None:
        """Tell the child that the stream is over, so that it waits for the next one."""
        if self._child is not None:
            try:
                self._child.send(END)
            except ChildDied:
                self._kill()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
