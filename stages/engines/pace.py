"""No more requests a minute than a server's limit: first attempts and retries, of all workers together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from stages.contract import Share


class Pace:
    """This worker's part of so many requests a minute, evenly spread, beginning at its own place among the others'; None: as many as there
    are. share: asked anew for each request, since workers may come.

    A first attempt is begun by whoever hands requests out (`seconds`, `begin`), which never blocks; whatever is sent after it in the same
    `entered` call, a retry, waits for a turn of its own (`sending`).
    """

    def __init__(self, per_minute: int | None, share: Callable[[], Share] = Share) -> None:
        self._every, self._share = 60.0 / per_minute if per_minute else 0.0, share
        self._lock, self._here = threading.Lock(), threading.local()
        self._next = time.monotonic() + self._every * share().number if per_minute else 0.0

    @property
    def interval(self) -> float:
        """Seconds between two requests of this worker."""
        return self._every * self._share().of

    @property
    def seconds(self) -> float:
        """Until the next one may begin."""
        return max(0.0, self._next - time.monotonic()) if self._every else 0.0

    def begin(self) -> float:
        """One begins; in how many seconds."""
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + self.interval
            return at - now

    def entered(self) -> None:
        """This thread is about to send what was begun."""
        self._here.begun = True

    def sending(self, request: object) -> None:
        """A hook: the thread sends something. What nobody began (the list of models) is free."""
        begun = getattr(self._here, "begun", None)
        if begun is False and self._every:
            time.sleep(self.begin())
        elif begun:
            self._here.begun = False
