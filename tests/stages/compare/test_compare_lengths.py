"""What a selection trains on by itself: as many pairs as the select stage keeps, whatever other selections can rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.compare.lengths import trained_on
from stages.compare.pool import Arm, on_one_pool
from stages.contract import Context, Rows, Silent
from stages.select.stage import Select

N = 40


def arm(name: str, inputs: dict[str, list[Path]], objectives: list[Any] | None = None, **select: Any) -> Arm:
    values = {
        "name": "t",
        "languages": {"seen": ["en", "de"]},
        "model": {"policy": "m"},
        "pairs": {"sources": [{"path": "p.jsonl"}]},
        "select": {"by": name, "keep": 0.5, **select},
        "train": {"orthalign": {"objectives": objectives or []}},
    }
    return Arm(name, RunConfig.model_validate(values), inputs)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, list[Path]]:
    """Training pairs, three quarters of them English; one in three has no judge scores, one in five no conflict score."""
    rng = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "scores": []}
    for i in range(N):
        ids = {"pair_id": f"p{i:02}", "language": "de" if i % 4 == 0 else "en"}
        texts = {side: [{"role": "user", "content": f"{side} {i}"}] for side in ("prompt", "chosen", "rejected")}
        judged = {side: rng.random() if i % 3 else None for side in ("chosen_score", "rejected_score")}
        where = {"round": 0, "prompt_id": f"q{i}", "group_id": f"g{i}", "split": "train", "source": "s"}
        rows["pairs"].append(ids | texts | judged | where)
        empty = {"cosines": [], "conflicting_languages": [], "norm": 1.0, "weight": 0.5, "gradient_norm": 0.5}
        score = {"score": rng.random() if i % 5 else None, "implicit_margin": 0.0, "logp_margin": 0.0, "n_tokens": 4}
        rows["scores"].append(ids | empty | score | {"flags": []})
    for name, made in rows.items():
        pq.write_table(pa.Table.from_pylist(made, schema=TABLES[name].schema), tmp_path / f"{name}.parquet")
    return {name: [tmp_path / f"{name}.parquet"] for name in rows}


def curated(arm: Arm) -> list[str]:
    made = Select().run(Context(arm.config, 0, arm.inputs, {}, Silent()))
    tables = [rows.data for rows in made if isinstance(rows, Rows) and rows.table == "curated"]
    return [language for table in tables for language in table["language"].to_pylist()]


def test_a_selection_has_the_pairs_that_the_stage_gives_it(inputs: dict[str, list[Path]]) -> None:
    arms = [arm(by, inputs) for by in ("conflict", "margin", "random")]
    assert [trained_on(one, 0) for one in arms] == [{"": len(curated(one))} for one in arms] == [{"": 16}] * 3
    assert on_one_pool(arms, 0).kept["margin"].sum() == 11, "of what all can rank it would be fewer"


def test_of_a_sequence_the_pairs_of_each_objective_are_counted(inputs: dict[str, list[Path]]) -> None:
    german, all_of_them = {"name": "de", "where": "language = 'de'"}, {"name": "all", "where": "round = 0"}
    one = arm("conflict", inputs, [german, all_of_them])
    assert trained_on(one, 0) == {"de": curated(one).count("de"), "all": 16}
    nothing = arm("conflict", inputs, [german, {"name": "sw", "where": "language = 'sw'"}])
    with pytest.raises(UserError, match="conflict: no pair that it keeps fits objective sw"):
        trained_on(nothing, 0)
