"""Generate on the tiny model, as a worker would run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import engine_support
import pytest
import torch

from stages.contract import Context


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_context(tiny_model: Path) -> Callable[..., Context]:
    return partial(engine_support.make_context, tiny_model)
