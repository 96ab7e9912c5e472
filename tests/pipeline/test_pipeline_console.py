"""What a log file shows: whole lines, a time left that can be believed, rows by language in tables that fit."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import console as module
from pipeline.console import Display, StageBar
from pipeline.summary import _reasons, _rows
from schemas.manifests import StageManifest, Tally


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that time.monotonic gives."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines_of(clock: list[float], total: int, done: int, steps: list[tuple[float, int]]) -> list[str]:
    out = io.StringIO()
    bar = StageBar(Console(file=out, width=40), "generate")
    with bar:
        bar.total(total, "prompt", done)
        for seconds, amount in steps:
            clock[0] += seconds
            bar.advance(amount, {"tokens_per_s": 12.5})
    return out.getvalue().splitlines()


def test_what_two_kinds_of_rows_were_dropped_for_is_said_of_each() -> None:
    tallies = [
        Tally(unit=unit, language="en", rows_in=n, kept=0, dropped={"not_sampled": n})
        for unit, n in (("prompt", 20), ("pair", 3))
    ]
    manifest = StageManifest.model_construct(stage="evaluate", tallies=tallies)
    assert _reasons(manifest) == [
        "  evaluate dropped not_sampled: 20 prompts (en 20)",
        "  evaluate dropped not_sampled: 3 pairs (en 3)",
    ]


def test_the_time_left_counts_what_this_run_did_and_not_what_it_found_done(clock: list[float]) -> None:
    _, line = lines_of(clock, total=100, done=60, steps=[(10.0, 10), (10.0, 10)])
    assert line == "  generate: 80 of 100 prompt, about 20 s left  12.5 tokens/s"


def test_no_time_left_is_guessed_from_the_first_few_rows(clock: list[float]) -> None:
    first, second = lines_of(clock, total=100, done=0, steps=[(30.0, 1), (10.0, 9)])
    assert "left" not in first and "1 of 100" in first
    assert "10 of 100 prompt, about 100 s left" in second


def test_without_a_total_there_is_still_a_count(clock: list[float]) -> None:
    assert lines_of(clock, total=0, done=0, steps=[(12.0, 7)]) == ["  generate: 7 prompt in 12 s  12.5 tokens/s"]


def manifest(stage: str, unit: str, kept: dict[str, tuple[int, int]]) -> StageManifest:
    tallies = [
        Tally(unit=unit, language=code, rows_in=rows, kept=n, dropped={"tie": rows - n} if rows > n else {})
        for code, (n, rows) in kept.items()
    ]
    return StageManifest(stage=stage, round=0, fingerprint="", content="", files=[], tallies=tallies)


@pytest.mark.parametrize("width", [30, 60, 200])
def test_rows_by_language_fit_the_terminal_and_nothing_is_cut(width: int) -> None:
    stages = ["generate", "judge", "pairs", "select"]
    found = [manifest(stage, "candidate", {"de": (1_234, 5_678), "sw": (7, 7)}) for stage in stages]
    tables = _rows(found, width)
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in tables:
        console.print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert text.count("1,234/5,678") == text.count("1,241/5,685") == len(stages)
    headers = itertools.chain.from_iterable(table.columns[1:] for table in tables)
    assert [str(column.header).split("\n")[0] for column in headers] == stages


def test_work_before_any_stage_is_news_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model is hashed and looked at before the first stage begins."""
    display = Display()
    out = io.StringIO()
    display.console = Console(file=out, width=60)  # type: ignore[assignment]
    monkeypatch.setattr(module, "_FIRST_SECONDS", 0.01)
    with display.busy("looking at models"):
        deadline = time.monotonic() + 10
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
    assert out.getvalue() == "  looking at models ...\n"
    with display.busy("a moment"), pytest.raises(ValueError, match="x"):
        raise ValueError("x")


GOES_ON = "d = Display(); d.say('one'); d.say('two'); Path(sys.argv[1]).write_text('the end')"
ENDS = "Terminal().print('one'); Path(sys.argv[1]).write_text('the end')"


@pytest.mark.parametrize(("code", "stream", "end"), [(GOES_ON, "stderr", True), (ENDS, "stdout", False)])
def test_nobody_reads_any_more(tmp_path: Path, code: str, stream: str, end: bool) -> None:
    """`run ... | tee log` whose terminal is closed goes on in silence; `inspect ... | head` ends well."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; from pathlib import Path; from pipeline.console import Display, Terminal; {code}"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "end"], **{stream: writing}, check=False)
    os.close(writing)
    assert done.returncode == 0 and (tmp_path / "end").exists() == end
