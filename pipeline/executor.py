"""What an executor is: it carries out orders and reports what happens. The run loop knows no more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.commit import PreparedPart
from pipeline.messages import Order


@dataclass(frozen=True)
class Reports:
    """What the executor tells the run loop.

    offered: a part is whole; it is committed in this call. tick: called at least every second; may raise to end the run.
    """

    total: Callable[[int, str], None]
    advance: Callable[[int, Mapping[str, float]], None]
    note: Callable[[str], None]
    started: Callable[[int], None]
    offered: Callable[[PreparedPart], None]
    tick: Callable[[], None]


class Executor(Protocol):
    """Carries out orders, one after the other."""

    def run(self, order: Order, key: str | None, reports: Reports) -> None:
        """Carry out an order; every part of it is offered. key: orders with equal keys share loaded engines.

        Raises UserError, StageFailed or Interrupted.
        """

    def close(self) -> None:
        """End whatever computes, at once where it is busy."""
