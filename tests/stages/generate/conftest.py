"""Generate on the tiny model, as a worker would run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import engine_support
import pytest

from stages.contract import Context


@pytest.fixture
def make_context(tiny_model: Path) -> Callable[..., Context]:
    return partial(engine_support.make_context, tiny_model)
