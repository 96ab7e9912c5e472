"""Where workers live: a crew starts members, on this machine (`pipeline.local_crew`) or elsewhere; a pool keeps them busy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.messages import Order, ToDriver, ToWorker


class MemberDied(Exception):
    """A worker is gone. cause: in words."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Member(Protocol):
    """One worker. log: where its last words are."""

    log: Path

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
        """How many members an order that is cut into shards could have."""

    def start(self, order: Order, slot: int, of: int) -> Member:
        """A member in a free place, one of `of` that share what there is."""

    def wait(self, members: Sequence[Member], seconds: float) -> None:
        """Until one of them says something or dies, at most so long."""

    def stop(self) -> None:
        """Ask all members to stop at their next safe point."""
