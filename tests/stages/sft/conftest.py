"""Fixtures of the sft stage's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.stages.sft.sft_bench import Bench


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Reference mode sets threads and deterministic kernels for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)
