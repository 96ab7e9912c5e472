"""Stages for testing the run loop: numbers in, squares out. Imported by worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import Account, ArtifactStage, Context, Drop, Part, Rows, Shard, ShardStage, TableStage, tally
from stages.spec import StageSpec

PROMPTS = StageSpec("prompts", "table", "fake_stages:Numbers", (), ("prompts",), ("prompts",), per_round=False)
GENERATE = StageSpec(
    "generate", "shard", "fake_stages:Squares", ("prompts",), ("candidates",), ("generate",), expensive=True
)
SELECT = StageSpec("select", "table", "fake_stages:Sum", ("candidates",), ("curated",), ("select",))
TRAIN = StageSpec(
    "train",
    "artifact",
    "fake_stages:Folder",
    ("curated",),
    (),
    ("train",),
    expensive=True,
    keeps="checkpoint",
    machines="train.nodes",
)


def rows(table: str, **columns: list) -> pa.Table:
    """Rows of a documented table: the given columns, and empty values in the others."""
    n = len(next(iter(columns.values())))
    empty = {pa.string(): "", pa.int64(): 0, pa.int32(): 0, pa.float32(): 0.0, pa.float64(): 0.0}
    schema = TABLES[table].schema
    return pa.table({f.name: columns.get(f.name, [empty.get(f.type, [])] * n) for f in schema}, schema=schema)


def _flag(name: str) -> Path:
    return Path(os.environ.get("FAKE_DIR", "/nonexistent")) / name


def _mark(name: str) -> None:
    """Leave a file where the test looks for it."""
    if _flag(".").is_dir():
        _flag(name).touch()


def _maybe_die(name: str) -> None:
    """Kill this worker once, if the test left a file that says so."""
    flag = _flag(name)
    if flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class Numbers(TableStage):
    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        n = ctx.config.prompts.max_chars
        yield Rows("prompts", rows("prompts", source_row=list(range(n))))
        yield Account(tally("row", ["en"] * n, []))


class Squares(ShardStage):
    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        for shard in shards:
            numbers = shard.rows.column("source_row").to_pylist()
            _maybe_die(f"die-{shard.index}")
            _mark(f"at-{shard.index}")
            time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
            while _flag("hold").exists():
                time.sleep(0.05)
            if ctx.config.generate.candidates == 13:
                raise UserError("thirteen is not a number of candidates", where="generate.candidates")
            if ctx.config.generate.candidates == 14:
                raise RuntimeError("a defect")
            if _flag(f"hang-{shard.index}").exists():
                _flag(f"hang-{shard.index}").unlink()
                time.sleep(600)
            ctx.limit("generate.size", 7, "no room") if _flag("no-room").exists() else None
            drops = [Drop("prompt", str(n), "en", "odd") for n in numbers if n % 2]
            if _flag("fail").exists():
                drops = [Drop("prompt", str(n), "en", "engine_error", f"no answer {n}", True) for n in numbers if n % 2]
            kept = [n * n for n in numbers if n % 2 == 0]
            ctx.progress.advance(len(numbers))
            yield Part(
                shard.index,
                {"candidates": rows("candidates", n_tokens=kept)},
                tally("prompt", ["en"] * len(numbers), drops),
                drops,
                {"seen": float(len(numbers))},
            )


class Sum(TableStage):
    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        frame = ctx.scan("candidates").collect()
        ctx.progress.note(f"limits {ctx.limits}")
        yield Rows("curated", rows("curated", chosen_score=[float(frame["n_tokens"].sum())]))
        yield Account(tally("candidate", ["en"] * frame.height, []))


class Folder(ArtifactStage):
    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        assert ctx.folder is not None
        marker = ctx.folder / "checkpoint"
        resumed = marker.exists()
        marker.write_text("half way")
        _maybe_die("die-train")
        together = ""
        if ctx.machines:
            import fake_training  # imports torch

            together = f" by {fake_training.train(ctx)}"
        out = ctx.folder / "result.txt"
        out.write_text(("resumed" if resumed else "fresh") + together)
        yield Account([], artifacts=[out])
