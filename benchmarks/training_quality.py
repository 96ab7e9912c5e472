"""Do the training methods do what their papers say? Reward, tax and retention of each beside its baselines, several seeds.

    python -m benchmarks.training_quality --work FOLDER [--table omo,orthalign-two,orthalign-three,congrad,allo] [--seeds 0,1,2]
        [--only PART_OF_A_NAME] [--print] [--plot docs/omo.svg] [--model NAME [--base NAME] [--learning-rate X]]

Every training is the project's own train stage. Without --model the tables are a SANITY CHECK: a model of under one million parameters,
pretrained and fine-tuned here on the texts of data/. With --model the same tables are made on a real model (--base: the pretrained
one it was made from; methods that need it are left out otherwise). One Parquet row per table, method and seed is committed to FOLDER
as it finishes: the same command again goes on where it was stopped, --print only prints. What is not there prints as `missing`.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import plot, tables
from benchmarks.quality.results import Results
from benchmarks.quality.world import Size, World, own_world, real_world


def say(line: str) -> None:
    """A line for people, at once."""
    print(line, file=sys.stderr, flush=True)


def main(given: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of models and rows")
    parser.add_argument("--table", default=",".join(tables.TABLES))
    parser.add_argument("--seeds", default="0,1,2", help="processes with different ones may share --work")
    parser.add_argument("--only", default="", help="run methods with this in their name")
    parser.add_argument("--print", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, help="write reward against tax of table omo as SVG")
    parser.add_argument("--model", help="a real model instead of the sanity check's own")
    parser.add_argument("--base", help="the pretrained model it was made from")
    parser.add_argument("--learning-rate", type=float, help="peak rate of AdamW")
    arguments = parser.parse_args(given)
    names, seeds = arguments.table.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := set(names) - set(tables.TABLES):
        parser.error(f"unknown table {', '.join(sorted(unknown))}; known: {', '.join(tables.TABLES)}")
    if arguments.base and not arguments.model:
        parser.error("--base belongs to --model")
    size = Size()
    if arguments.learning_rate or arguments.model:
        size = replace(size, learning_rate=arguments.learning_rate or 5e-6)
    work = arguments.work.resolve()
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    results, key = Results(work / "results"), tables.world_key(size, arguments.model, arguments.base)

    @cache
    def world(seed: int) -> World:
        folder = work / "worlds" / key
        if arguments.model:
            return real_world(folder, seed, size, arguments.model, arguments.base)
        return own_world(folder, seed, size, say)

    if not arguments.print:
        for seed in seeds:
            for name in names:
                tables.fill(name, results, key, lambda: world(seed), seed, arguments.only, say)  # noqa: B023
    what = f"model {arguments.model}" if arguments.model else "SANITY CHECK on a model of under one million parameters"
    print(f"{what}; mean over {len(seeds)} seeds (lowest..highest)\n")
    for name in names:
        print(tables.printed(name, results, key, seeds))
    if arguments.plot:
        found = tables.collected("omo", results, key, seeds)
        arguments.plot.write_text(plot.frontier(found, tables.TABLES["omo"].columns), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
