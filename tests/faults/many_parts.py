"""How long `status` takes on a finished run of many parts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.commit import write_manifest
from pipeline.config_file import dump
from pipeline.fingerprint import content_of
from pipeline.plan import Planner
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.manifests import FileRecord, PartManifest, ShardRange, StageManifest, Tally

LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "it", "ja", "sw", "zh")
SHA = "0123456789abcdef" * 4
_SHARDED = ("generate", "judge", "gradients")


def finished_run(root: Path, parts: int, sharded: Sequence[str] = _SHARDED) -> None:
    """A finished run whose stages `sharded` have `parts` parts together, every one with dropped rows."""
    values = {
        "name": root.name,
        "run_dir": str(root.parent),
        "languages": {"seen": list(LANGUAGES)},
        "model": {"policy": "some/model"},
        "prompts": {"sources": [{"path": "prompts.jsonl"}]},
    }
    config, rundir = RunConfig.model_validate(values), RunDir(root)
    planner = Planner(config, rundir, lambda step: dict.fromkeys(step.spec.models, "digest"), lambda spec: {})
    root.mkdir(parents=True)
    rundir.config.write_text(dump(config), encoding="utf-8")
    for step in planner.steps:
        state = planner.state(step)
        assert state.plan is not None
        count = parts // len(sharded) if step.spec.name in sharded else 1
        tallies = [Tally(unit="row", language=x, rows_in=9, kept=6, dropped={"tie": 3}) for x in LANGUAGES]
        shards = [ShardRange(index=n, start=90 * n, stop=90 * n + 90) for n in range(count)]
        plan = state.plan.model_copy(update={"shards": shards})
        records: list[FileRecord] = []
        common = {"stage": step.spec.name, "round": 0, "fingerprint": plan.fingerprint, "tallies": tallies}
        folder = rundir.state(step.spec, 0)
        write_manifest(folder / "plan.json", plan.model_dump())
        for index in range(count):
            own = []
            for table in (*step.spec.writes, "dropped"):
                path = rundir.table(step.spec, 0, table) / f"part-{index:05d}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x")
                relative = path.relative_to(root).as_posix()
                own.append(FileRecord(path=relative, table=table, rows=90, bytes=1, sha256=SHA))
            part = PartManifest(index=index, files=own, **common)
            (folder / f"part-{index:05d}.json").write_text(part.model_dump_json(indent=1), encoding="utf-8")
            records += own
        whole = StageManifest(content=content_of(records), files=records, **common)
        write_manifest(folder / "_stage.json", whole.model_dump())


def seconds_of_status(root: Path) -> tuple[float, float]:
    """Wall and processor time of the command. Raises CalledProcessError, or ValueError if the run is not finished."""
    begun, used = time.monotonic(), _processor()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "status", str(root)], capture_output=True, text=True, check=True
    )
    if "Everything is up to date" not in done.stdout:
        raise ValueError(done.stdout + done.stderr)
    return time.monotonic() - begun, _processor() - used


def _processor() -> float:
    times = os.times()
    return times.children_user + times.children_system


def measure(parts: int) -> str:
    """The best of three, in words."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder) / "many"
        finished_run(root, parts)
        wall, processor = min(seconds_of_status(root) for _ in range(3))
    return f"status of a finished run of {parts:,} parts: {wall:.2f} s, processor {processor:.2f} s (best of three)"
