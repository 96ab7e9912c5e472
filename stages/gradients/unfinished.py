"""What a shard has so far, on disk every few seconds: a process that ends in the middle of a shard loses little of it.

Whoever computes the shard next cuts its batches as if nothing were known and leaves out what is, so that the results are those
of one go, bit for bit where the device repeats its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas import files
from stages.contract import Context, Stopped

Result = TypeVar("Result")
State = Mapping[str, Tensor]

_SAVE_SECONDS = 20.0
_SHARE = 0.05
"""Of the time, that saving may take at most: a large state is saved less often."""


@dataclass
class Unfinished:
    """One shard's results while it is computed, of any number of passes over its pairs.

    path: of its file, which is replaced as a whole; None: nothing is kept. stop: whether to end at the next safe point.
    """

    path: Path | None
    stop: Callable[[], bool]
    seconds: float = field(default=0.0, init=False)
    """What earlier processes spent on what is known."""

    def __post_init__(self) -> None:
        self._rows: dict[str, dict[str, State]] = {}  # pass -> pair id -> values
        self._states: dict[str, State] = {}
        self._live: dict[str, Callable[[], State]] = {}
        self._pending: list[Callable[[], None]] = []
        self._load()
        self._begun = self._saved = time.monotonic()
        self._took = 0.0

    @classmethod
    def of(cls, ctx: Context, shard: int) -> Unfinished:
        """Of a shard: what an earlier process left, if it did."""
        return cls(ctx.unfinished(shard) if ctx.unfinished is not None else None, ctx.stop)

    def rows(self, name: str) -> Mapping[str, State]:
        """What is known of a pass, by pair id."""
        return self._rows.get(name, {})

    def keep(self, name: str, state: Callable[[], State]) -> State:
        """Save a state with the rows of this pass from here on: they are nothing without each other. Returns what an earlier process
        kept of it. Rows of another pass that had a state go with that."""
        for other in {*self._states, *self._live} - {name}:
            self._rows.pop(other, None)
        found = self._states.pop(name, {})
        if not found:
            self._rows.pop(name, None)
        self._live, self._states = {name: state}, {}
        return found

    def add(self, name: str, rows: Callable[[], Mapping[str, State]]) -> None:
        """Results that are there now, asked for when they are saved. Raises Stopped, after they are, when the run is to stop."""
        if self.path is None:
            return
        self._pending.append(lambda: self._rows.setdefault(name, {}).update(rows()))
        stop = self.stop()
        if stop or time.monotonic() - self._saved >= max(_SAVE_SECONDS, self._took / _SHARE):
            self._save(self.path)
        if stop:
            raise Stopped

    def _save(self, path: Path) -> None:
        begun = time.monotonic()
        for take in self._pending:
            take()
        self._pending.clear()
        tensors = {f"state/{name}/{key}": value for name, state in self._live.items() for key, value in state().items()}
        for name, rows in self._rows.items():
            for key in next(iter(rows.values()), {}):
                tensors[f"rows/{name}/{key}"] = torch.stack([row[key] for row in rows.values()])
        seconds = self.seconds + begun - self._begun
        told = {"seconds": seconds, "ids": {name: list(rows) for name, rows in self._rows.items()}}
        with files.publishing(path) as temporary:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, temporary, {"told": json.dumps(told)}
            )
        self._saved = time.monotonic()
        self._took = self._saved - begun

    def _load(self) -> None:
        """A file that is not whole is as if it had never been written."""
        if self.path is None or not self.path.is_file():
            return
        try:
            with safe_open(self.path, "pt") as opened:
                told: dict[str, Any] = json.loads(opened.metadata()["told"])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return
        self.seconds = float(told["seconds"])
        self._rows = {name: {pair: {} for pair in ids} for name, ids in told["ids"].items()}
        for full, values in tensors.items():
            kind, name, key = full.split("/", 2)
            if kind == "state":
                self._states[name] = {**self._states.get(name, {}), key: values}
            else:
                for pair, value in zip(told["ids"][name], values, strict=True):
                    self._rows[name][pair] = {**self._rows[name][pair], key: value}


@dataclass
class Pass(Generic[Result]):
    """One pass over some pairs of the shard, as `TokenBudget.run` remembers it.

    ids: of its items, in order. pack, unpack: a result as named tensors, and back. settle: called before results are packed.
    """

    unfinished: Unfinished
    name: str
    ids: Sequence[str]
    pack: Callable[[Result], State]
    unpack: Callable[[State], Result]
    settle: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        rows = self.unfinished.rows(self.name)
        self.known: dict[int, Result] = {i: self.unpack(rows[id_]) for i, id_ in enumerate(self.ids) if id_ in rows}

    def add(self, indices: Sequence[int], results: Sequence[Result]) -> None:
        """Remember results. Raises Stopped."""

        def rows() -> dict[str, State]:
            self.settle()
            return {self.ids[i]: self.pack(result) for i, result in zip(indices, results, strict=True)}

        self.unfinished.add(self.name, rows)
