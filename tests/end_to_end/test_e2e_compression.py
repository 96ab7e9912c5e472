"""Both ways of compressing gradients through the real run loop: resume, workers, bad input, never a NaN in a table."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch

ONE_SIDED = {
    "gradients__sketch__method": "one_sided",
    "gradients__sketch__rank": 3,
    "gradients__aggregate_size": 9,
    "conflict__leave_out": "pair",
}
IMPORTED = {
    "prompts": {},
    "pairs": {"sources": [{"path": "package:authored_pairs/{language}.jsonl"}], "test_fraction": 0.2},
    "evaluate__authored": [],
}
TABLES = ("contributions", "sums", "gradients", "scores", "gram", "directions", "curated", "rejected")


def read(root: Path, table: str) -> pl.DataFrame:
    return pl.read_parquet(root / "round-0" / table / "*.parquet")


def table_bytes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for table in TABLES
        for path in sorted((root / "round-0" / table).glob("*.parquet"))
    }


def killed_after(path: Path, root: Path, stage: str) -> None:
    """Start the run and kill its driver when the stage's first part is committed."""
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--until", "select"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None:
        events = (root / "events.jsonl").read_text().splitlines() if (root / "events.jsonl").exists() else []
        if any(e["event"] == "part_done" and e.get("stage") == stage for e in map(json.loads, events)):
            break
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


def test_one_sided_in_two_passes_is_resumed_from_any_kill_with_any_number_of_workers(
    write_tiny, pipeline_command, tmp_path
):
    one = write_tiny(**IMPORTED, **ONE_SIDED)
    pipeline_command("run", str(one), "--until", "select")
    root = tmp_path / "runs/t"
    status = json.loads(pipeline_command("status", str(root), "--json").stdout)
    by_stage = {stage["stage"]: stage for stage in status["stages"]}
    train = read(root, "pairs").filter(pl.col("split") == "train").height
    for stage in ("aggregate", "gradients"):
        (rows,) = by_stage[stage]["rows"]
        assert (rows["unit"], rows["in"], rows["kept"]) == ("pair", train, train)
    assert by_stage["aggregate"]["stats"]["sketch_cosine_error"] > 0
    assert read(root, "contributions").height == read(root, "scores").height == train
    alone = table_bytes(root)
    shutil.move(root, tmp_path / "alone")

    two = write_tiny(**IMPORTED, **ONE_SIDED, execution__workers=2)
    for stage in ("aggregate", "gradients"):
        killed_after(two, root, stage)
    pipeline_command("run", str(two), "--until", "select")
    got = table_bytes(root)
    assert set(got) == set(alone)
    assert [name for name in got if got[name] != alone[name]] == []
    assert "Up to date" in pipeline_command("run", str(two), "--until", "select").stderr
    assert "report.html" in pipeline_command("report", str(root)).stdout + pipeline_command("status", str(root)).stdout
    page = (root / "report.html").read_text()
    assert "one-sided (Flora), rank 3" in page and "standard error of a cosine" in page


def test_preconditioned_sketches_of_both_sides_and_their_error(write_tiny, pipeline_command, tmp_path):
    path = write_tiny(
        **IMPORTED,
        gradients__sketch={
            "dim": 512,
            "both_sides": True,
            "precondition": "adam_factored",
            "precondition_pairs": 6,
            "error_pairs": 4,
        },
    )
    pipeline_command("run", str(path), "--until", "select")
    root = tmp_path / "runs/t"
    rows = read(root, "gradients")
    assert {"sketch_chosen", "norm_chosen", "sketch_rejected", "norm_rejected"} <= set(rows.columns)
    one = rows.row(0, named=True)
    parts = {n: torch.tensor(one[f"sketch{n}"]).double() * one[f"norm{n}"] for n in ("", "_chosen", "_rejected")}
    difference = parts["_chosen"] - parts["_rejected"]
    assert float((parts[""] - difference).norm()) <= 4e-3 * float(parts["_chosen"].norm() + parts["_rejected"].norm())
    factors = read(root, "preconditioner")
    assert set(factors["side"]) == {"out", "in"} and factors["factor"].explode().is_finite().all()
    shown = pipeline_command("inspect", str(root), "gradients", "--limit", "1").stdout
    assert "standard error of a cosine between two pairs" in shown


@pytest.fixture
def poisoned(tmp_path, tiny_model) -> tuple[Path, str]:
    """The tiny model with a token whose embedding is not a number, and a text that has it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(folder).encode("~", add_special_tokens=False)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, "~"


@pytest.mark.parametrize("method", ["two_sided", "one_sided"])
@pytest.mark.parametrize("languages", [("en", "de"), ("en",)], ids=["one pair in a language", "one language"])
def test_bad_pairs_are_dropped_or_flagged_and_no_table_has_a_nan(
    write_tiny, pipeline_command, tmp_path, poisoned, method, languages
):
    model, mark = poisoned
    rows = [
        {
            "group_id": f"g{n}",
            "language": "en",
            "prompt": f"Say number {n} .",
            "chosen": f"It is {n} .",
            "rejected": "No .",
        }
        for n in range(12)
    ]
    rows[1]["chosen"] = f"It is {mark} 1 ."
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3]["chosen"] = "long " * 2000
    if "de" in languages:
        rows.append({"group_id": "d", "language": "de", "prompt": "Sag eins.", "chosen": "Eins.", "rejected": "Zwei."})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    path = write_tiny(
        **{
            **IMPORTED,
            **ONE_SIDED,
            "pairs": {"sources": [{"path": str(file)}], "test_fraction": 0.0, "dev_fraction": 0.0},
            "gradients__sketch__method": method,
            "languages__seen": list(languages),
            "languages__unseen": [],
            "model__policy": str(model),
            "execution__max_failed_fraction": 0.5,
        }
    )
    pipeline_command("run", str(path), "--until", "select")
    root = tmp_path / "runs/t"
    reasons = {
        reason
        for folder in (root / "round-0/_dropped").iterdir()
        for reason in pl.read_parquet(folder / "*.parquet")["reason"]
    }
    assert {"identical", "too_long", "non_finite_gradient"} <= reasons
    scores = read(root, "scores")
    assert scores.height == len(rows) - 3
    for table in (
        "gradients",
        "scores",
        "gram",
        "directions",
        *(("sums", "contributions") if method == "one_sided" else ()),
    ):
        frame = read(root, table)
        for name, kind in frame.schema.items():
            values = frame[name].explode() if isinstance(kind, pl.List | pl.Array) else frame[name]
            if values.dtype.is_float():
                assert values.drop_nulls().is_finite().all(), (table, name)
    flags = {(row["language"], flag) for row in scores.to_dicts() for flag in row["flags"]}
    if "de" in languages:
        assert ("de", "no_own_direction") in flags and ("en", "few_pairs") in flags
    else:
        assert ("en", "single_language") in flags and scores["score"].null_count() == 0
