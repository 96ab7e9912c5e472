"""Cells are reproducible and group what points alike; the cap is a plain walk down the ranking."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.config.curation import DiversityConfig, SelectConfig
from schemas.sketches import sketch_array
from stages.select.diversity import cells
from stages.select.stage import Select, rank
from tests.stages.select.test_select_stage import config, many, tables

DIM = 16


def gradients(ids: list[str], centre: list[int], seed: int = 0) -> pa.Table:
    """Sketches near one of several axes, at random lengths."""
    rng = np.random.default_rng(seed)
    rows = 0.05 * rng.normal(size=(len(ids), DIM)) + np.eye(DIM)[centre]
    rows *= rng.uniform(0.5, 30, size=(len(ids), 1))
    return pa.table({"pair_id": ids, "sketch": sketch_array(rows.astype(np.float16))})


def parts(folder: Path, table: pa.Table, rows: int) -> list[Path]:
    paths = []
    for start in range(0, table.num_rows, rows):
        paths.append(folder / f"part-{rows}-{start:05}.parquet")
        pq.write_table(table.slice(start, rows), paths[-1])
    return paths


def test_what_points_alike_shares_a_cell_whatever_its_length_and_the_parts(tmp_path: Path) -> None:
    centre = [i % 4 for i in range(200)]
    table = gradients([f"p{i}" for i in range(200)], centre)
    found = cells(parts(tmp_path, table, 200), 4, (1,))
    assert found["pair_id"].to_list() == table["pair_id"].to_pylist()
    pairs_of = Counter(zip(centre, found["cell"], strict=True))
    assert len(pairs_of) == 4 and set(pairs_of.values()) == {50}
    again = cells(parts(tmp_path, table, 33), 4, (1,))
    assert again.equals(found)
    assert cells(parts(tmp_path, table, 200), 500)["cell"].n_unique() <= 200
    assert cells([], 4).is_empty()


def scattered(seed: int, n: int = 400) -> np.ndarray:
    """A tight bundle of directions beside wide ones: where a centre's length would count, cells would be cut otherwise."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, DIM)) * np.where(np.arange(n) % 3, 1.0, 0.15)[:, None] + np.eye(DIM)[0] * 1.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def one_table(rows: np.ndarray) -> pa.Table:
    return pa.table({"pair_id": [f"p{i}" for i in range(len(rows))], "sketch": sketch_array(rows)})


def test_only_where_a_sketch_points_decides_its_cell(tmp_path: Path) -> None:
    """Each row longer or shorter by a power of two, which float16 does not round: the same cells."""
    rows = scattered(1)
    length = np.exp2(np.random.default_rng(2).integers(-3, 4, len(rows))).astype(np.float16)
    plain = cells(parts(tmp_path, one_table(rows), 400), 6, (1,))
    for path in tmp_path.iterdir():
        path.unlink()
    assert cells(parts(tmp_path, one_table(rows * length[:, None]), 400), 6, (1,)).equals(plain)


def test_a_pair_is_in_the_cell_whose_mean_direction_it_is_nearest_to(tmp_path: Path) -> None:
    """By angle, whatever the spread of a cell; after 20 steps all but a few at the borders."""
    rows = scattered(3)
    cell = cells(parts(tmp_path, one_table(rows), 400), 6, (1,))["cell"].to_numpy()
    unit = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    means = np.stack([unit[cell == k].mean(axis=0) for k in range(6)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.mean((unit @ means.T).argmax(axis=1) == cell) > 0.97


def test_other_seeds_may_cut_otherwise_but_each_is_reproducible(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sketch = sketch_array(rng.normal(size=(300, DIM)).astype(np.float16))
    files = parts(tmp_path, pa.table({"pair_id": [f"p{i}" for i in range(300)], "sketch": sketch}), 300)
    results = [cells(files, 8, (seed,)) for seed in (0, 0, 1)]
    assert results[0].equals(results[1]) and not results[0].equals(results[2])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["en", "de"]), st.one_of(st.none(), st.integers(-5, 5)), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    ),
    st.floats(0.05, 1.0),
    st.floats(0.25, 1.0),
    st.sampled_from(["language", "global"]),
)
def test_the_cap_is_a_walk_down_the_ranking(rows: list[Any], keep: float, share: float, quota: Any) -> None:
    names = [f"{i:02}" for i in range(len(rows))]
    frame = pl.DataFrame(
        {
            "pair_id": names,
            "language": [r[0] for r in rows],
            "used": [r[1] for r in rows],
            "cell": [r[2] for r in rows],
        },
        schema={"pair_id": pl.String, "language": pl.String, "used": pl.Float64, "cell": pl.Int64},
    )
    ranked = rank(frame, SelectConfig(keep=keep, quota=quota, diversity=DiversityConfig(cells=4, share=share)))
    want: dict[str, str | None] = {name: "no_score" for name in names}
    for group in (["en"], ["de"]) if quota == "language" else (["en", "de"],):
        order = sorted(
            (-r[1], name, r[2]) for name, r in zip(names, rows, strict=True) if r[0] in group and r[1] is not None
        )
        cut = max(1, math.floor(keep * len(order) + 0.5))
        cap = max(1, math.floor(share * cut + 0.5))
        given_by: Counter[int] = Counter()
        for _, name, cell in order:
            if sum(given_by.values()) == cut:
                want[name] = "below_cut"
            elif given_by[cell] == cap:
                want[name] = "crowded_cell"
            else:
                given_by[cell] += 1
                want[name] = None
    assert dict(zip(names, ranked["reason"], strict=True)) == want


def test_the_stage_caps_cells_and_accounts_for_every_pair(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    """Half of the pairs are alike and score best: without a cap they are all that is kept."""
    pairs, _ = many(20)
    ids = [row["pair_id"] for row in pairs]
    alike = [int(name[2:]) < 10 for name in ids]
    scores = {name: (1.0 if same else 0.0) + i / 1000 for i, (name, same) in enumerate(zip(ids, alike, strict=True))}
    sketches = gradients(ids, [0 if same else 1 + i % 3 for i, same in enumerate(alike)])
    inputs = tables(pairs, scores) | {"gradients": sketches}
    plain = run_stage(Select(), config(keep=0.5), **inputs)
    assert all(int(row["pair_id"][2:]) < 10 for row in plain.rows("curated"))
    outcome = run_stage(Select(), config(keep=0.5, diversity={"cells": 4, "share": 0.3}), **inputs)
    kept = [row["pair_id"] for row in outcome.rows("curated")]
    assert Counter(name[:2] for name in kept) == {"en": 10, "de": 10}
    cell = dict(cells(parts(tmp_path, sketches, 40), 4, (0, "select", 0)).iter_rows())
    assert max(Counter((name[:2], cell[name]) for name in kept).values()) == 3  # 0.3 of 10
    for language in ("en", "de"):
        tally = outcome.tally("pair", language)
        assert tally.rows_in == 20 and tally.kept == 10 and tally.dropped["crowded_cell"] >= 1
    detail = next(drop.detail for drop in outcome.drops if drop.reason == "crowded_cell")
    assert "of its cell" in detail
    assert any("gave way" in note for note in outcome.notes)


def test_cells_that_run_out_are_said(run_stage: Callable[..., Any]) -> None:
    pairs, scores = many(10)
    ids = [row["pair_id"] for row in pairs]
    inputs = tables(pairs, scores) | {"gradients": gradients(ids, [0] * 15 + [1] * 5)}
    outcome = run_stage(Select(), config(keep=1.0, diversity={"cells": 2, "share": 0.5}), **inputs)
    kept = len(outcome.rows("curated"))
    assert kept < 20 and any(f"the cells ran out: {kept} pairs kept instead of 20" in note for note in outcome.notes)


def test_a_cap_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ValidationError, match="cells \\* share is below 1"):
        SelectConfig(diversity=DiversityConfig(cells=5, share=0.1))
