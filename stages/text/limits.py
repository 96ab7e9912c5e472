"""A limit on time for code of others that may never end: chat templates are programs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from schemas.errors import UserError

_Result = TypeVar("_Result")


def in_time(seconds: float, call: Callable[[], _Result], problem: UserError) -> _Result:
    """What `call` returns or raises; `problem` is raised when that takes longer. The call itself cannot be stopped: it ends with the
    process, which the error ends."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise problem
    return results[0]
