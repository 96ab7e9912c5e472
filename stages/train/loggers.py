"""Training loggers (`train.report_to`): checked before hours are spent, their files kept in the stage's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError

_FOLDER_VARIABLES = ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR")


def check_loggers(section: TrainerConfig) -> None:
    """Raise UserError for a logger transformers does not know or that is not installed."""
    available, where = get_available_reporting_integrations(), f"{section.section}.report_to"
    for name in section.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"{name!r} is not a logger TRL knows",
                where=where,
                fix=f"Known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}; [] for none.",
            )
        if name not in available:
            raise UserError(
                f"the logger {name} is not installed",
                where=where,
                fix=f"pip install {name}, or remove it from {where}.",
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
