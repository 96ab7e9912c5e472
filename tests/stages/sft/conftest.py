"""Fixtures of the sft stage's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.sft.sft_bench import Bench


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)
