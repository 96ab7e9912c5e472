"""A run of fake stages: the run loop, workers and commits are tested without models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import yaml

from pipeline import export
from pipeline.config_file import dump
from pipeline.plan import State
from pipeline.rundir import RunDir
from schemas import files
from schemas.config import RunConfig
from schemas.manifests import StageManifest, Tally
from schemas.tables import TABLES
from stages.catalog import BY_NAME
from stages.schedule import Step


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


@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, range], None]:
    """Make a run whose curated pairs are those of these numbers, and nothing else, as `export` finds it."""

    def make(config: RunConfig, numbers: range) -> None:
        rundir = RunDir(config.folder)
        folder = rundir.table(BY_NAME["select"], 0, "curated")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rundir.config.write_text(dump(config))
        part = folder / "part-00000.parquet"
        pl.DataFrame(pa.Table.from_pylist([_pair(n) for n in numbers], schema=TABLES["curated"].schema)).write_parquet(
            part
        )
        records = [files.record(rundir.root, part, "curated", len(numbers))]
        tally = Tally(unit="pair", language="en", rows_in=9 + len(numbers), kept=len(numbers), dropped={"below_cut": 9})
        manifest = StageManifest(stage="select", round=0, fingerprint="f", content="c", files=records, tallies=[tally])
        done = State(Step(BY_NAME["select"], 0), "done", manifest=manifest)
        planner = type("Planner", (), {"states": lambda self: [done]})
        monkeypatch.setattr(export, "recorded_planner", lambda *_: planner())

    return make


def _pair(n: int) -> dict:
    user, chosen, rejected = ({"role": r, "content": f"{r} {n}"} for r in ("user", "assistant", "assistant"))
    return {
        "pair_id": f"p{n}", "prompt_id": f"q{n}", "group_id": f"g{n}", "language": "en", "prompt": [user],
        "chosen": [chosen], "rejected": [rejected], "chosen_score": 3.0, "rejected_score": 1.0, "conflict_score": 0.1,
    }  # fmt: skip
