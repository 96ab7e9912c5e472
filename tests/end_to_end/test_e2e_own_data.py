"""Other people's data, end to end: HH dialogues without a prompt column become pairs, gradients and a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

HISTORY = "\n\nHuman: Tell me about topic {n}.\n\nAssistant: Sure. What exactly?\n\nHuman: The start."


def dialogues(path: Path) -> Path:
    rows = [
        {
            side: HISTORY.format(n=n) + f"\n\nAssistant: {text.format(n=n)}"
            for side, text in (("chosen", "It started in year {n}."), ("rejected", "I will not say, {n}."))
        }
        for n in range(14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def own_data(write_tiny: Any, tmp_path: Path) -> Any:
    def write(path: Path, **source: Any) -> Path:
        return write_tiny(
            languages={"seen": ["en"], "identify": False},
            prompts={},
            pairs={"sources": [{"path": str(path), "language": "en", **source}], "min_margin": 0.0},
            generate={},
            judge={},
        )

    return write


def test_hh_dialogues_are_curated_and_trained_on(own_data: Any, inline_command: Any, tmp_path: Path) -> None:
    done = inline_command("run", str(own_data(dialogues(tmp_path / "hh.jsonl"))), "--until", "train")
    assert "dialogues written as one text (Human: ... Assistant: ...) read as messages" in done.output
    root = tmp_path / "runs/t/round-0"
    pairs = pl.read_parquet(root / "pairs/*.parquet")
    assert pairs.height == 14
    first = pairs.filter(pl.col("source").is_not_null()).row(0, named=True)
    assert [message["role"] for message in first["prompt"]] == ["user", "assistant", "user"]
    assert first["prompt"][0]["content"] == "Tell me about topic 0."
    assert first["chosen"] == [{"role": "assistant", "content": "It started in year 0."}]
    assert first["rejected"] == [{"role": "assistant", "content": "I will not say, 0."}]
    assert (root / "train/model").is_dir()


def test_dropped_rows_can_be_inspected_when_none_is_left_and_where_none_was_dropped(
    own_data: Any, inline_command: Any, tmp_path: Path
) -> None:
    path = tmp_path / "same.jsonl"
    row = {"prompt": "What is water made of?", "chosen": "Of gold.", "rejected": "Of gold."}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(3)), encoding="utf-8")
    done = inline_command("run", str(own_data(path)), "--until", "pairs", check=False)
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    assert "no training pair in any language: row identical 3" in said and "Traceback" not in said
    run = str(tmp_path / "runs/t")
    shown = inline_command("inspect", run, "dropped/pairs").stdout
    assert "3 of 3 rows of dropped/pairs" in shown and "What is water made of?" in shown

    rows = [{**row, "rejected": f"Of silver, {n}.", "prompt": f"What is {n}?"} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    inline_command("run", str(own_data(path)), "--until", "pairs")
    assert "0 of 0 rows of dropped/pairs" in inline_command("inspect", run, "dropped/pairs").stdout
