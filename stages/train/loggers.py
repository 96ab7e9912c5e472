"""Training loggers (`train.report_to`): checked before hours are spent, their files kept in the stage's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from schemas.config.loggers import LOGGERS
from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError

_FOLDER_VARIABLES = ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR", "MLFLOW_TRACKING_URI")


def check_loggers(section: TrainerConfig) -> None:
    """Raise UserError for a logger that cannot report: not installed (preflight says so earlier), or switched off in the environment."""
    available, where = get_available_reporting_integrations(), f"{section.section}.report_to"
    for name in section.report_to:
        if name not in available:
            raise UserError(
                f"the logger {name} is not available",
                where=where,
                fix=f"pip install {LOGGERS[name].install}, or remove it from {where}.",
            )


@contextmanager
def logs_in(folder: Path) -> Iterator[None]:
    """Point the loggers at `folder` while training, unless the user's environment says where; then restore it."""
    added = [name for name in _FOLDER_VARIABLES if name not in os.environ]
    os.environ.update({name: str(folder) for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def report_under(title: str, callbacks: Iterable[Any]) -> None:
    """Of the callbacks, let loggers name what they report `<title>/<name>`: a phase's steps begin at 0 again, and would be drawn over
    another's."""
    loggers: tuple[Any, ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in callbacks:
        if title and isinstance(callback, loggers):
            callback.on_log = _titled(callback.on_log, title)


def _titled(on_log: Callable[..., None], title: str) -> Callable[..., None]:
    def titled(*args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        on_log(*args, logs=logs and {f"{title}/{name}": value for name, value in logs.items()}, **kwargs)

    return titled
