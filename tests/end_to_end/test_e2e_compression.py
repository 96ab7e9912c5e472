"""Both ways of compressing gradients through the real run loop: resume, workers, bad input, never a NaN in a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import pipeline.loop
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.inspect import print_rows
from pipeline.selection import Selection
from pipeline.status import states_of
from tests.faults.inline import InlineExecutor

ONE_SIDED = {
    "gradients__sketch": {"method": "one_sided", "rank": 3},
    "gradients__aggregate_size": 9,
    "conflict__leave_out": "pair",
}
IMPORTED = {
    "prompts": {},
    "pairs": {"sources": [{"path": "package:authored_pairs/{language}.jsonl"}], "test_fraction": 0.2},
    "evaluate__authored": [],
}


class Killed(BaseException):
    """The run ends here, as if its process had died."""


class DiesAfter(list):
    """A list of offered parts that ends the run as the one after `parts` is offered: those before it are committed. 0: never."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def append(self, item: object) -> None:
        if self.parts and len(self) == self.parts:
            raise Killed
        super().append(item)


@pytest.fixture
def inline(inline_stages, monkeypatch):
    """inline(config file, parts=0): the real run loop and stages in this process until select; it dies after `parts`."""

    def run(path: Path, parts: int = 0) -> list[tuple[str, int]]:
        monkeypatch.setattr(InlineExecutor, "computed", DiesAfter(parts), raising=False)
        pipeline.loop.run(load_config(path, ()), Selection(last="select"), Display(quiet=True))
        return list(InlineExecutor.computed)

    return run


TABLES = ("contributions", "sums", "gradients", "scores", "gram", "directions", "curated", "rejected")


def read(root: Path, table: str) -> pl.DataFrame:
    return pl.read_parquet(root / "round-0" / table / "*.parquet")


def table_bytes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for table in TABLES
        for path in sorted((root / "round-0" / table).glob("*.parquet"))
    }


def test_one_sided_in_two_passes_is_resumed_after_every_part(write_tiny, inline, tmp_path):
    path, root = write_tiny(**IMPORTED, **ONE_SIDED), tmp_path / "runs/t"
    whole = inline(path)
    parts = {stage: sum(name == stage for name, _ in whole) for stage in ("aggregate", "gradients")}
    assert parts["aggregate"] > 2 and parts["gradients"] > 2
    rows = {state.step.spec.name: state.manifest for state in states_of(root) if state.manifest is not None}
    train = read(root, "pairs").filter(pl.col("split") == "train").height
    for stage in parts:
        assert sum(t.rows_in for t in rows[stage].tallies) == sum(t.kept for t in rows[stage].tallies) == train
    assert rows["aggregate"].stats["sketch_cosine_error"] > 0
    assert read(root, "contributions").height == read(root, "scores").height == train
    alone = table_bytes(root)

    shutil.rmtree(root)
    done: list[tuple[str, int]] = []
    for _ in range(len(whole) - 1):
        with pytest.raises(Killed):
            inline(path, parts=1)
        done += InlineExecutor.computed
    done += inline(path, parts=1)
    assert done == whole, "what was committed is never computed again"
    assert inline(path) == []
    got = table_bytes(root)
    assert set(got) == set(alone) and [name for name in got if got[name] != alone[name]] == []


def test_two_worker_processes_make_the_same_tables_and_the_report_shows_them(
    write_tiny, inline, pipeline_command, inline_command, tmp_path
):
    path, root = write_tiny(**IMPORTED, **ONE_SIDED), tmp_path / "runs/t"
    inline(path)
    alone = table_bytes(root)
    shutil.rmtree(root)
    path = write_tiny(**IMPORTED, **ONE_SIDED, execution__workers=2)
    pipeline_command("run", str(path), "--until", "gradients")
    inline(path)
    got = table_bytes(root)
    assert set(got) == set(alone) and [name for name in got if got[name] != alone[name]] == []
    shown = inline_command("status", str(root)).stdout
    assert "aggregate" in shown and "precondition" not in shown
    inline_command("report", str(root))
    page = (root / "report.html").read_text()
    assert "one-sided (Flora), rank 3" in page and "standard error of a cosine" in page


def test_preconditioned_sketches_of_both_sides_and_their_error(write_tiny, inline, tmp_path, capsys):
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
    inline(path)
    root = tmp_path / "runs/t"
    rows = read(root, "gradients")
    assert {"sketch_chosen", "norm_chosen", "sketch_rejected", "norm_rejected"} <= set(rows.columns)
    one = rows.row(0, named=True)
    numbers = {n: np.frombuffer(one[f"sketch{n}"], "<f2").astype(float) for n in ("", "_chosen", "_rejected")}
    parts = {n: torch.from_numpy(numbers[n]) * one[f"norm{n}"] for n in ("", "_chosen", "_rejected")}
    difference = parts["_chosen"] - parts["_rejected"]
    assert float((parts[""] - difference).norm()) <= 4e-3 * float(parts["_chosen"].norm() + parts["_rejected"].norm())
    factors = read(root, "preconditioner")
    assert set(factors["side"]) == {"out", "in"} and factors["factor"].explode().is_finite().all()
    print_rows(root, "gradients", None, None, 1, 0)
    assert "standard error of a cosine between two pairs" in capsys.readouterr().out


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
    write_tiny, inline, tmp_path, poisoned, method, languages
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
            **(ONE_SIDED if method == "one_sided" else {"conflict__leave_out": "pair"}),
            "pairs": {"sources": [{"path": str(file)}], "test_fraction": 0.0, "dev_fraction": 0.0},
            "languages__seen": list(languages),
            "languages__unseen": [],
            "model__policy": str(model),
            "execution__max_failed_fraction": 0.5,
        }
    )
    inline(path)
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
