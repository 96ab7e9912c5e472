"""A run of fake stages: the run loop, workers and commits are tested without models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def write_config(tmp_path: Path):
    """Write a config file with some values changed; returns its path."""

    def write(text: str = "", **values: object) -> Path:
        base = {
            "name": "t",
            "run_dir": str(tmp_path / "runs"),
            "languages": {"seen": ["en", "de"]},
            "model": {"policy": str(tmp_path)},
            "prompts": {"sources": [{"path": "prompts.jsonl"}]},
        }
        path = tmp_path / "config.yaml"
        path.write_text(text or yaml.safe_dump(base | values), encoding="utf-8")
        return path

    return write
