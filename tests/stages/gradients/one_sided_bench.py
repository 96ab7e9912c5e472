"""A small one-sided run: config, pairs, and both passes over them."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import RunConfig
from schemas.tables import TABLES
from stages.conflict.stage import Conflict
from stages.gradients.aggregate import Aggregate
from stages.gradients.stage import Gradients
from tests.stages.stage_context import WORDS, collect, context, shards

RANK, SEED = 6, 5
CODES = ["en", "de", "zh"]


def config(conflict=None, loss=None, **gradients) -> RunConfig:
    sketch = {"method": "one_sided", "seed": SEED, "error_pairs": 0} | gradients.pop("sketch", {})
    sketch |= {"rank": RANK} if sketch["method"] == "one_sided" else {}
    conflict = conflict or {}
    ema = {"ema_batch": 2, "ema_gamma": 0.7} if conflict.get("direction") == "ema" else {}
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": CODES},
            "model": {"policy": "m", "dtype": "float32"},
            "text": {"max_length": 60},
            "prompts": {"sources": [{"path": "x"}]},
            "loss": loss or {},
            "gradients": {"sketch": sketch, "token_budget": 256, **gradients},
            "conflict": {"leave_out": "pair"} | ema | conflict,
        }
    )


def table(n: int, seed: int, languages: list[str] | None = None) -> pa.Table:
    rng = random.Random(seed)

    def text(k: int) -> str:
        return " ".join(rng.choices(WORDS, k=k))

    rows = [
        {
            "pair_id": f"p{i}", "round": 0, "prompt_id": f"q{i}", "group_id": f"g{i}",
            "language": languages[i] if languages else rng.choice(CODES), "split": "test" if i % 6 == 5 else "train",
            "prompt": [{"role": "user", "content": text(rng.randint(2, 5))}],
            "chosen": [{"role": "assistant", "content": text(rng.randint(1, 6))}],
            "rejected": [{"role": "assistant", "content": text(rng.randint(1, 6))}],
            "source": "x",
        }
        for i in range(n)
    ]  # fmt: skip
    for row in rows:
        while row["rejected"] == row["chosen"]:
            row["rejected"] = [{"role": "assistant", "content": text(3)}]
    return pa.Table.from_pylist(rows, schema=TABLES["pairs"].schema)


def files(folder, name: str, tables: list[pa.Table]):
    paths = []
    for n, part in enumerate(tables):
        paths.append(folder / f"{name}-{n}.parquet")
        pq.write_table(part, paths[-1])
    return paths


def first_pass(tmp_path, models, pairs, config_, size=4):
    ctx = context(tmp_path, config_, models, pairs=pairs)
    parts = sorted(Aggregate().run(ctx, shards(pairs, size)), key=lambda part: part.index)
    return parts, {name: files(tmp_path, name, [p.tables[name] for p in parts]) for name in ("contributions", "sums")}


def both_passes(tmp_path, models, pairs, config_, size=4, second_size=3):
    first, tables = first_pass(tmp_path, models, pairs, config_, size)
    ctx = context(tmp_path, config_, models, pairs=pairs, **tables)
    second = sorted(Gradients().run(ctx, shards(pairs, second_size)), key=lambda part: part.index)
    gradients = files(tmp_path, "gradients", [part.tables["gradients"] for part in second])
    ctx = context(tmp_path, config_, {}, pairs=pairs, gradients=gradients, **tables)
    got, account = collect(Conflict(), ctx)
    for name, rows in got.items():
        assert rows.schema.equals(TABLES[name].schema)
    return got, account, first, second
