"""Time of conflict + select on synthetic pairs, as a ratio to just reading the sketches; peak memory beside it.

    python -m benchmarks.conflict_scale [--pairs 100000] [--languages 10] [--dim 8192] [--shared 0.1] [--common 0.05] [--mixed]
        [--folder FOLDER | --at FOLDER] [--set metric=layer]

Pairs are random sketches with a weak shared direction (--common 0: none, so that half of all language pairs conflict, which is what surgery and
`refit` take time for), written as the gradients stage writes them (float16, parts of 2,048).
Translations of one task share a group and lie as far apart as they can: the table is in order of language. Both stages run in
a process of their own, whose peak memory is measured; the same parts are read before and after, the faster reading counts.
1,000,000 pairs of the default size need 17 GB of disk, and as much again where all sketches wait (--set leave_out=group). All in
FOLDER, whose free space is looked at first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from schemas.config import RunConfig
from schemas.config.curation import ConflictConfig
from schemas.tables import TABLES, gradients_schema
from stages.contract import Account, Context, Rows, Silent

_PART = 2048
_POOL = 16
_BESIDE = 1024
"""Bytes of a pair beside its sketch, in all tables."""


def codes(languages: int) -> list[str]:
    """As many languages of ISO 639-3, private use: qaa, qab, …"""
    letters = "abcdefghijklmnopqrst"
    return [f"q{letters[n // 26]}{chr(97 + n % 26)}" for n in range(languages)]


def write(folder: Path, pairs: int, languages: int, dim: int, shared: float, mixed: bool, common: float = 0.05) -> None:
    """The gradients and pairs tables. Sketches repeat after `_POOL` parts: nobody compares them with each other."""
    from stages.gradients.cuts import COLUMNS
    from stages.gradients.projections import LayerShape, SketchLayout
    from stages.gradients.store import LAYOUT_KEY, SEED_KEY, sketch_columns

    shapes = [LayerShape(f"model.layers.{n // 4}.proj{n % 4}", 4096, 4096) for n in range(32)]
    layout = SketchLayout.plan(shapes, dim)
    metadata = {LAYOUT_KEY: layout.to_json().encode(), SEED_KEY: b"0"}
    schema = gradients_schema(layout.dim).with_metadata(metadata)
    generator = torch.Generator().manual_seed(0)
    common_D, known = common * torch.randn(layout.dim, generator=generator), codes(languages)
    parts = min(_POOL, -(-pairs // _PART))
    pool = [sketch_columns("", torch.randn(_PART, layout.dim, generator=generator) + common_D) for _ in range(parts)]
    compression: Any = {name: "none" if name == "sketch" else "zstd" for name in schema.names}
    for start in range(0, pairs, _PART):
        at = np.arange(start, min(start + _PART, pairs))
        n, language = len(at), at % languages if mixed else at * languages // pairs
        sketches = {name: column[:n] for name, column in pool[start // _PART % parts].items()}
        ids = [f"{i:032x}" for i in at]
        names = [known[k] for k in language]
        groups = [f"{i:032x}" for i in (at // languages if mixed else at % (pairs // languages))]
        logp = -20 + torch.randn(4, n, generator=generator)
        half = pairs // 2  # a pair shares its chosen answer with one as far away as can be
        answers = [i % half if i % half < shared * half else i for i in at.tolist()]
        columns: dict[str, Any] = {
            "pair_id": ids, "group_id": groups, "language": names, "split": ["train"] * n, **sketches,
            "logp_chosen": logp[0].numpy(), "logp_rejected": logp[1].numpy(),
            "ref_logp_chosen": logp[2].numpy(), "ref_logp_rejected": logp[3].numpy(),
            "n_prompt": [9] * n, "n_chosen": [20] * n, "n_rejected": [20] * n, "ids_hash": ids,
            **dict.fromkeys(COLUMNS, pa.nulls(n, pa.float32())),
        }  # fmt: skip
        table = pa.table(columns, schema=schema)
        file = folder / f"gradients-{start:09}.parquet"
        pq.write_table(table, file, compression=compression, use_dictionary=["language"])
        messages = {
            "prompt": _messages("user", ["question"] * n),
            "chosen": _messages("assistant", [f"good {answer:032x} " * 10 for answer in answers]),
            "rejected": _messages("assistant", [f"bad {one} " * 10 for one in ids]),
        }
        values = {"pair_id": ids, "round": [0] * n, "prompt_id": groups, "group_id": groups, "language": names,
                  "split": ["train"] * n, "source": ["synthetic"] * n, **messages}  # fmt: skip
        pairs_schema = TABLES["pairs"].schema
        table = pa.table(
            [values[f.name] if f.name in values else pa.nulls(n, f.type) for f in pairs_schema], schema=pairs_schema
        )
        pq.write_table(table, folder / f"pairs-{start:09}.parquet", compression="zstd")


def _messages(role: str, texts: list[str]) -> pa.Array:
    """One message a row."""
    fields = [pa.array([role] * len(texts)), pa.array(texts)]
    return pa.ListArray.from_arrays(
        pa.array(range(len(texts) + 1), pa.int32()), pa.StructArray.from_arrays(fields, ["role", "content"])
    )


def read(folder: Path) -> tuple[float, float]:
    """(seconds, processor seconds) to read every sketch, and do nothing with it."""
    begun, worked = time.perf_counter(), time.process_time()
    for file in sorted(folder.glob("gradients-*.parquet")):
        with pq.ParquetFile(file) as parquet:
            for _ in parquet.iter_batches(512, columns=["sketch", "norm"]):
                pass
    return time.perf_counter() - begun, time.process_time() - worked


def stages(folder: Path, languages: int, changes: dict[str, Any]) -> dict[str, float]:
    """Run conflict, then select, in this process."""
    from stages.conflict.stage import Conflict
    from stages.select.stage import Select

    config = RunConfig.model_validate(
        {
            "name": "scale",
            "languages": {"seen": codes(languages)},
            "model": {"policy": "none"},
            "prompts": {"sources": [{"path": "none"}]},
            "conflict": changes,
        }
    )
    inputs = {name: sorted(folder.glob(f"{name}-*.parquet")) for name in ("gradients", "pairs")}
    found: dict[str, float] = {}
    for name, stage in (("conflict", Conflict()), ("select", Select())):
        begun, worked, writers = time.perf_counter(), time.process_time(), {}
        for item in stage.run(Context(config, 0, inputs, {}, Silent())):
            if isinstance(item, Account):
                found |= {f"{name} {key}": value for key, value in item.stats.items()}
            elif isinstance(item, Rows):
                path = folder / f"out-{item.table}.parquet"
                if item.table not in writers:
                    writers[item.table] = pq.ParquetWriter(path, item.data.schema, compression="zstd")
                    inputs[item.table] = [path]
                writers[item.table].write_table(item.data)
        for writer in writers.values():
            writer.close()
        found[f"{name} seconds"] = time.perf_counter() - begun
        found[f"{name} work"] = time.process_time() - worked
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["scores"] = pq.read_metadata(folder / "out-scores.parquet").num_rows
    return found


def _changes(items: list[str]) -> dict[str, str]:
    return dict(item.split("=", 1) for item in items)


def _bytes(dim: int, changes: dict[str, str]) -> int:
    """Disk a pair needs: the tables, and the sketch that waits for its group."""
    config = ConflictConfig.model_validate(changes)
    return (2 if config.leave_out == "pair" else 4) * dim + _BESIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--languages", type=int, default=10)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where to write the tables (default: the temporary folder)")
    parser.add_argument(
        "--at", type=Path, help="take the tables of an earlier run with --at from this folder, or write them there"
    )
    parser.add_argument("--mixed", action="store_true", help="languages take turns, instead of one after the other")
    parser.add_argument("--shared", type=float, default=0.1, help="share of pairs whose chosen answer another pair has")
    parser.add_argument(
        "--common", type=float, default=0.05, help="what all pairs share, of 1; 0: half of all language pairs conflict"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the conflict section")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(stages(args.folder, args.languages, _changes(args.set))))
        return
    with ExitStack() as entered:
        folder = args.at or Path(
            entered.enter_context(tempfile.TemporaryDirectory(prefix="conflict-scale-", dir=args.folder))
        )
        folder.mkdir(exist_ok=True)
        if not any(folder.glob("gradients-*")):
            need, free = args.pairs * _bytes(args.dim, _changes(args.set)), shutil.disk_usage(folder).free
            if free < need:
                parser.error(f"{need / 1e9:,.1f} GB are needed in {folder}, {free / 1e9:,.1f} GB are free: --folder")
            write(folder, args.pairs, args.languages, args.dim, args.shared, args.mixed, args.common)
        size = sum(file.stat().st_size for file in folder.glob("gradients-*"))
        command = [sys.executable, "-m", "benchmarks.conflict_scale", "--child", "--folder", str(folder)]
        command += ["--languages", str(args.languages), *(f"--set={item}" for item in args.set)]
        first = read(folder)
        environment = {**os.environ, "TMPDIR": str(folder)}
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        lines = child.stdout.splitlines()
        second = read(folder)
    found = json.loads(lines[-1])
    assert found["scores"] == args.pairs
    ours, work = (found[f"conflict {key}"] + found[f"select {key}"] for key in ("seconds", "work"))
    reading, read_work = min(first[0], second[0]), min(first[1], second[1])
    print(
        f"{args.pairs:,} pairs, {args.languages} languages, {args.dim:,} numbers each, {args.shared:.0%} share answers, {size / 1e9:.2f} GB"
    )
    print(f"reading the sketches once: {reading:.2f} s (the other time {max(first[0], second[0]):.2f} s)")
    print(f"conflict {found['conflict seconds']:.2f} s + select {found['select seconds']:.2f} s")
    print(f"{1e6 * ours / args.pairs:.1f} µs a pair; {1e6 * ours / args.pairs:.0f} s a million")
    print(f"ratio: {ours / reading:.2f} x reading ({work / read_work:.2f} x its processor time)")
    print(f"peak memory: {found['peak'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
