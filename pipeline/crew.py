"""Where workers live: a crew starts members, on this machine (`pipeline.local_crew`) or elsewhere; a pool keeps them busy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.messages import Order, ToDriver, ToWorker


class MemberDied(Exception):
    """A worker is gone. cause: in words. counts: not with others that died of the same."""

    def __init__(self, cause: str, counts: bool = True) -> None:
        super().__init__(cause, counts)
        self.cause, self.counts = cause, counts


class Member(Protocol):
    """One worker. log: where its last words are."""

    log: Path

    @property
    def place(self) -> str:
        """Node and GPUs, in words; empty while there is no room for it yet."""

    def send(self, message: ToWorker) -> None:
        """Tell it; one that is dead is not told, and `received` says so."""

    def received(self) -> Iterator[ToDriver]:
        """What it has said since. Raises MemberDied after the last word of one that died."""

    def end(self, seconds: float) -> None:
        """Let one that was sent Leave close what it has loaded; kill it when that takes longer."""

    def kill(self) -> None:
        """End it at once with whatever it started. Nothing that it says later is heard."""


class Crew(Protocol):
    """Starts members."""

    def size(self, order: Order) -> int:
        """How many members an order that is cut into shards could have now; asked again while it is carried out."""

    def start(self, order: Order, slot: int, of: int) -> Member:
        """A member in a free place, one of `of` that share what there is."""

    def wait(self, members: Sequence[Member], seconds: float) -> None:
        """Until one of them says something or dies, at most so long."""

    def stop(self) -> None:
        """Ask all members to stop at their next safe point."""

    def close(self) -> None:
        """After the last member's end: leave whatever they came from."""


def worker_environment(threads: int) -> dict[str, str]:
    """What a worker's environment must say before it starts, since native libraries read it when they load."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "POLARS_MAX_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
