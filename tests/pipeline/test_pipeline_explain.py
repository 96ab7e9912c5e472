"""explain on tables of a finished round: ids by prefix, every state said, hostile text harmless, JSON readable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import pipeline.existing
import pipeline.explain
from pipeline.cli import app
from schemas.config import RunConfig
from schemas.tables import TABLES
from tests.stages.conflict.test_conflict_stage import config as conflict_config
from tests.stages.conflict.test_conflict_stage import draw, tables

HOSTILE = "\x1b[2J\u202eevil\x07[red] <script>alert(1)</script>"


@pytest.fixture
def explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """explain(*arguments, without=(), **tables) -> the command's result on a round with 24 scored pairs."""
    from stages.conflict.stage import Conflict
    from tests.stages.stage_context import collect, context

    g_ND, languages = draw(24, 7)
    texts = [(f"c{i}", f"r{i}") for i in range(24)]
    texts[3] = (HOSTILE, "x" * 5000)
    gradients, pairs = tables(g_ND, languages, texts=texts)
    held_out = pairs.to_pylist()[0] | {"pair_id": "held", "split": "test"}
    trusted = held_out | {"pair_id": "sure", "split": "dev"}
    zero = pairs.to_pylist()[1] | {"pair_id": "quiet"}
    pairs = pa.concat_tables([pairs, pa.Table.from_pylist([held_out, trusted, zero], schema=pairs.schema)])
    config: RunConfig = conflict_config()
    ctx = context(tmp_path, config, {}, gradients=gradients, pairs=pairs)
    files = dict(ctx.inputs)
    got, _ = collect(Conflict(), ctx)

    def write(name: str, rows: list[dict[str, Any]], table: str) -> None:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=TABLES[table].schema), tmp_path / f"{table}-{len(files)}.parquet"
        )
        files[name] = [tmp_path / f"{table}-{len(files)}.parquet"]

    body = {row["pair_id"]: row for row in pairs.to_pylist()}
    for name, table in got.items():
        write(name, table.to_pylist(), name)
    write("curated", [body["p3"] | {"conflict_score": 0.25}], "curated")
    write("rejected", [body["p4"] | {"conflict_score": -0.5, "reason": "below_cut"}], "rejected")
    drop = {"unit": "pair", "language": "en", "failed": False, "text": ""}
    detail = {"row_id": "p4", "reason": "below_cut", "detail": "place 8 of 8, 4 kept"}
    write("dropped/curated", [drop | detail], "dropped")
    write("dropped/gradients", [drop | {"row_id": "quiet", "reason": "too_long", "detail": "999 tokens"}], "dropped")

    def run(*arguments: str, without: tuple[str, ...] = (), target: str = "train") -> Any:
        here = {name: paths for name, paths in files.items() if name not in without}
        monkeypatch.setattr(pipeline.explain, "tables_of", lambda folder, round_: here)
        monkeypatch.setattr(pipeline.existing, "find_run", lambda run: tmp_path)
        monkeypatch.setattr(pipeline.existing, "config_of", lambda folder: conflict_config(target=target))
        return CliRunner().invoke(app, ["explain", "t", *arguments])

    return run


def test_a_kept_pair_with_hostile_text_is_told_in_full(explain) -> None:
    result = explain("p3", "--neighbours", "2")
    assert result.exit_code == 0, result.output
    assert "Kept: conflict +0.2500." in result.output
    assert "[U+001B][2J[U+202E]evil[U+0007][red] <script>" in result.output
    assert not {"\x1b", "\u202e", "\x07"} & set(result.output)
    assert "3,800 more characters" in result.output
    for words in ("cosine per language:", "block.0", "Nearest pairs", "Most opposed pairs"):
        assert words in result.output


def test_json_holds_the_same_in_ascii(explain) -> None:
    result = explain("p3", "--json")
    assert result.exit_code == 0 and result.output.isascii()
    found = json.loads(result.output)
    assert found["pair_id"] == "p3" and found["chosen"][0]["content"] == HOSTILE
    assert found["selection"] == {
        "kept": True, "ranked_by": "conflict", "value": 0.25, "reason": None, "detail": None
    }  # fmt: skip
    parts = found["conflict"]["layer_groups"]
    assert sum(part["contribution"] for part in parts) == pytest.approx(found["scores"]["score"], abs=1e-5)
    assert len(found["conflict"]["nearest"]) == len(found["conflict"]["opposed"]) == 5
    for neighbour in (*found["conflict"]["nearest"], *found["conflict"]["opposed"]):
        number = neighbour["pair_id"].removeprefix("p")
        assert (neighbour["chosen"], neighbour["rejected"]) == (f"c{number}", f"r{number}")
    assert "sketch" not in found["gradient"]


def test_neighbours_are_shown_by_one_harmless_line_of_their_answers(explain) -> None:
    output = explain("p4", "--neighbours", "23").output
    assert "| not: " in output and "c5 | not: r5" in output
    (line,) = {line for line in output.splitlines() if line.startswith("  p3 (") and "not: x" in line}
    assert "[U+001B][2J" in line and line.endswith("x" * 60 + " …")
    assert not {"\x1b", "\u202e", "\x07"} & set(output)


def test_a_rejected_pair_says_its_reason_and_place(explain) -> None:
    assert "Not kept (below_cut): conflict -0.5000, place 8 of 8, 4 kept." in explain("p4").output


def test_a_trusted_pair_is_in_the_directions(explain) -> None:
    assert "it is held out (dev)" in explain("sure").output
    assert "it is trusted (dev): it makes the directions" in explain("sure", target="dev").output


@pytest.mark.parametrize(
    ("pair", "without", "words"),
    [
        ("held", (), "it is held out (test)"),
        ("quiet", (), "it has no gradient: too_long (999 tokens)"),
        ("p5", ("scores", "directions"), "the stage conflict has not finished"),
        ("p5", ("curated", "rejected"), "the stage select has not finished"),
    ],
)
def test_what_is_not_known_is_said(explain, pair, without, words) -> None:
    result = explain(pair, without=without)
    assert result.exit_code == 0 and words in result.output


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("p", "More than one pair's id begins with 'p'"),
        ("p1", "p1, p10, p11, p12, p13, ..."),
        ("nothing", "No pair's id begins with 'nothing'"),
        ("", "More than one"),
        ("he", None),
    ],
)
def test_ids_are_found_by_a_beginning_that_only_one_has(explain, pair, words) -> None:
    result = explain(pair)
    assert result.exit_code == (0 if words is None else 1)
    assert words is None or words in result.output
    assert "Traceback" not in result.output


def test_without_torch_the_rest_is_still_told(explain, monkeypatch) -> None:
    monkeypatch.setattr(pipeline.explain, "find_spec", lambda name: None)
    result = explain("p3")
    assert result.exit_code == 0 and "torch is not installed" in result.output and "Kept" in result.output


def test_the_module_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, pipeline.explain; sys.exit(bool({'torch', 'faiss', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
