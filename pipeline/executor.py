"""What an executor is: it carries out orders and reports what happens. The run loop knows no more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.commit import PreparedPart
from pipeline.messages import Order


@dataclass(frozen=True)
class Reports:
    """What the executor tells the run loop.

    joined: a worker has a place, and where its log is. started, offered, advance: with the place where it happened. offered: a part
    is whole; it is committed in this call. tick: called at least every second; may raise to end the run.
    """

    joined: Callable[[str, Path], None]
    total: Callable[[int, str], None]
    advance: Callable[[int, Mapping[str, float], str], None]
    note: Callable[[str], None]
    started: Callable[[int, str], None]
    offered: Callable[[PreparedPart, str], None]
    tick: Callable[[], None]


class Executor(Protocol):
    """Carries out orders, one after the other."""

    def run(self, order: Order, key: str | None, reports: Reports) -> None:
        """Carry out an order; every part of it is offered. key: orders with equal keys share loaded engines.

        Raises UserError, Defect or Interrupted.
        """

    def close(self) -> None:
        """End whatever computes, at once where it is busy; nothing is carried out afterwards."""
