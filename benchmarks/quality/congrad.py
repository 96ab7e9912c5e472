"""Curation and optimizer together: a set in which part of the labels is flipped, all of it, a random half, the half with the best
conflict scores; trained with AdamW and with online merging. Sketches, scores and selection are the pipeline's own stages."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.methods import Bench, Method
from benchmarks.quality.results import Values
from benchmarks.quality.training import config_of, context_of, train, write_pairs
from schemas.ids import content_id
from stages.conflict.stage import Conflict
from stages.contract import Context, Part, Rows, Shard
from stages.gradients.stage import Gradients
from stages.select.stage import Select

DAMAGED = 0.3
SELECTIONS: dict[str, dict[str, Any]] = {
    "unfiltered": {"by": "random", "keep": 1.0},
    "random half": {"by": "random", "keep": 0.5},
    "curated half": {"by": "conflict", "keep": 0.5},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "OnDARE": {"optimizer": "ondare", "merge": {"alpha": 2e-3, "reserve": 0.5}},
}

_SKETCH = {"sketch": {"dim": 2048, "error_pairs": 0}}
_CONFLICT = {
    "leave_out": "pair"
}  # labels are flipped pair by pair, and refusals are shared answers: by group all would leave at once


def methods() -> list[Method]:
    """The lines of the table."""
    found = [Method("SFT, not trained", _untouched)]
    for optimizer, train_settings in OPTIMIZERS.items():
        for name, select in SELECTIONS.items():
            settings = {"select": select, "damaged": DAMAGED, "train": train_settings}
            found.append(Method(f"{optimizer}, {name}", _curated, settings))
    return found


def _untouched(bench: Bench, settings: Mapping[str, Any]) -> Values:
    return bench.measure(bench.world.sft)


def damage(rows: list[dict[str, str]], share: float, seed: int) -> tuple[list[dict[str, str]], set[int]]:
    """The rows with the sides of `share` of them swapped, an equal share in every language; and which."""
    rng = random.Random(seed)
    hit: set[int] = set()
    for code in sorted({row["language"] for row in rows}):
        mine = [n for n, row in enumerate(rows) if row["language"] == code]
        hit.update(rng.sample(mine, round(share * len(mine))))
    flipped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if n in hit else row for n, row in enumerate(rows)
    ]
    return flipped, hit


def _curated(bench: Bench, settings: Mapping[str, Any]) -> Values:
    world, folder = bench.world, bench.scratch / scores_name(settings["damaged"])
    rows = [row for row in bench.rows(*bench.together) if row["split"] == "train"]
    rows, hit = damage(rows, settings["damaged"], world.seed)
    bad = {f"{rows[n]['group_id']}-{rows[n]['language']}" for n in hit}
    tables = _scored(bench, folder, rows)
    config = config_of(world, select=dict(settings["select"]))
    ctx = context_of(world, config, world.sft, {n: tables[n] for n in ("pairs", "scores", "gradients")})
    curated = folder / "curated.parquet"
    kept = _stage(Select(), ctx)["curated"]
    pq.write_table(kept, curated)
    inputs = {"curated": [curated], "gradients": tables["gradients"]}
    model = train(world, bench.scratch / "now", world.sft, rows, inputs=inputs, **settings["train"]).model
    share = sum(pair_id in bad for pair_id in kept["pair_id"].to_pylist()) / kept.num_rows
    return bench.measure(model) | {"damaged": share, "pairs": float(kept.num_rows)}


def scores_name(damaged: float) -> str:
    """Name of the folder of pairs, gradients and scores: what an interrupted run made with other settings is not taken up."""
    return f"curation-{content_id(damaged, _SKETCH, _CONFLICT)[:12]}"


def _scored(bench: Bench, folder: Path, rows: list[dict[str, str]]) -> dict[str, list[Path]]:
    """pairs, gradients and scores, made once a seed; `folder` is named after what else they depend on."""
    names = ("pairs", "gradients", "scores")
    files = {name: [folder / f"{name}.parquet"] for name in names}
    if all(path.is_file() for paths in files.values() for path in paths):
        return files
    world = bench.world
    pairs = write_pairs(folder, rows)
    ctx = context_of(
        world, config_of(world, gradients=_SKETCH, conflict=_CONFLICT), world.sft, {"pairs": files["pairs"]}
    )
    parts: list[Part] = list(Gradients().run(ctx, iter([Shard(0, pq.read_table(pairs))])))
    pq.write_table(parts[0].tables["gradients"], files["gradients"][0])
    scored = _stage(Conflict(), context_of(world, ctx.config, world.sft, {n: files[n] for n in ("pairs", "gradients")}))
    temporary = folder / "scores.tmp"
    pq.write_table(scored["scores"], temporary)
    temporary.rename(files["scores"][0])
    return files


def _stage(stage: Any, ctx: Context) -> dict[str, pa.Table]:
    """Run a table stage to its end."""
    tables: dict[str, list[pa.Table]] = {}
    for item in stage.run(ctx):
        if isinstance(item, Rows):
            tables.setdefault(item.table, []).append(item.data)
    return {name: pa.concat_tables(parts) for name, parts in tables.items()}
