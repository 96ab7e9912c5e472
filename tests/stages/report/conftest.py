"""Fake runs for the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_bench import SEEN, Builder


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., Builder]:
    """Build a fake run in the test's folder: languages, pairs per language, rounds, config overrides."""

    def build(languages: list[str] | None = None, per_language: int = 30, rounds: int = 1, **config: Any) -> Builder:
        folder = tmp_path / "tables"
        folder.mkdir(exist_ok=True)
        return Builder(folder, languages or SEEN, per_language, rounds, **config)

    return build
