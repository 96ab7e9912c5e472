"""Nothing outside the run directory is ever written or deleted, and a run directory that goes away ends the run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from pipeline.rundir import RunDir
from schemas.errors import UserError
from tests.faults.inline import fake_stages

PLACES = [
    "_tmp",
    "prompts",
    "_state",
    "_state/prompts",
    "_dropped",
    "logs",
    "events.jsonl",
    "run.yaml",
    "round-0",
    "round-0/candidates",
    "round-0/_state",
    "round-0/_state/generate",
    "round-0/_state/generate/part-00000.json",
    "round-0/_dropped/candidates",
    "round-0/train",
    "round-0/candidates/part-00000.parquet",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("finished", [False, True], ids=["new", "finished"])
@pytest.mark.parametrize("command", [{}, {"force": ("prompts",)}], ids=["run", "force"])
def test_a_link_in_the_run_directory_is_refused_and_what_lies_behind_it_untouched(
    fake, tmp_path, place, finished, command
):
    if finished:
        fake()
    behind = tmp_path / "behind"
    link = fake.root / place
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.move(link, behind)
    elif link.exists():
        behind.write_bytes(link.read_bytes())
        link.unlink()
    elif "." in link.name:
        behind.write_text("mine")
    else:
        behind.mkdir()
        for name in ("mine.txt", "part-00000.parquet", "part-00000.json", ".x.tmp"):
            (behind / name).write_text("mine")
    link.symlink_to(behind)
    before = contents(behind) if behind.is_dir() else behind.read_bytes()
    with pytest.raises(UserError, match="link in the run directory"):
        fake(**command)
    assert link.is_symlink() and before == (contents(behind) if behind.is_dir() else behind.read_bytes())


def test_a_run_directory_that_is_a_link_itself_is_taken(fake, tmp_path):
    (tmp_path / "scratch").mkdir()
    fake.root.parent.mkdir(parents=True)
    fake.root.symlink_to(tmp_path / "scratch")
    fake()
    assert (tmp_path / "scratch/run.yaml").is_file() and fake.root.is_symlink()
    assert not fake().ran


def test_a_link_that_appears_later_is_seen_where_a_path_is_handed_out(fake, tmp_path):
    fake()
    rundir, spec = RunDir(fake.root), fake_stages.GENERATE
    shutil.move(fake.root / "round-0", tmp_path / "elsewhere")
    (fake.root / "round-0").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    for touch in (
        lambda: rundir.clear(spec, 0),
        lambda: rundir.sweep(spec, 0, []),
        lambda: rundir.table(spec, 0, "candidates"),
    ):
        with pytest.raises(UserError, match="link in the run directory"):
            touch()
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("gone", ["deleted", "moved", "read-only events"])
def test_a_run_directory_that_goes_away_ends_the_run_in_seconds(fake_process, gone):
    """The driver once took a failing event log for a dead pipe, and waited for a live worker without end."""
    process, run = fake_process(FAKE_SECONDS="1")
    deadline = time.monotonic() + 60
    while not list(run.root.glob("round-0/candidates/*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if gone == "deleted":
        shutil.rmtree(run.root, ignore_errors=True)
        shutil.rmtree(run.root, ignore_errors=True)
    elif gone == "moved":
        run.root.rename(run.root.with_name("moved"))
    else:
        (run.root / "events.jsonl").unlink()
        (run.root / "events.jsonl").mkdir()
    _, said = process.communicate(timeout=60)
    assert process.returncode in (1, 2) and "Traceback" not in said, said
