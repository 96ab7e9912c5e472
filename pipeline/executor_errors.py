"""How a run can end early, apart from UserError. Light: the command line imports it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from schemas.errors import UserError


class Defect(Exception):
    """Something broke that is not the user's to fix. trace: of the process where it did."""

    def __init__(self, what: str, trace: str, where: str) -> None:
        super().__init__(f"{what} ({where}). What is committed stays; the same command continues.")
        self.trace = trace


class StageFailed(Defect):
    """A stage raised it; holds the traceback of the worker."""

    def __init__(self, stage: str, message: str, trace: str, log: Path) -> None:
        self.stage, self.message, self.log = stage, message, log
        super().__init__(f"Stage {stage} failed: {message}", trace, f"log: {log}")


class Interrupted(BaseException):
    """The run was asked to stop by a signal; what is committed stays. Like KeyboardInterrupt no Exception: nothing that mends errors may take it
    for one."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.signal = int(number)
        super().__init__(signal.Signals(number).name)


def ending(error: BaseException) -> dict[str, Any]:
    """How a run ended, for its last event: error, kind (user | defect | stopped), the command's exit code."""
    kind, code = "defect", 2
    if isinstance(error, UserError):
        kind, code = "user", 1
    elif isinstance(error, Interrupted):
        kind, code = "stopped", 128 + error.signal
    elif not isinstance(error, Defect):
        code = 1
    text = str(error) if kind == "user" else f"{type(error).__name__}: {error}"
    return {"ok": False, "error": text, "kind": kind, "exit_code": code}
