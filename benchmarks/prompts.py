"""Rows per second of the prompts stage, beside what its parts cost alone.

    python benchmarks/prompts.py [--rows 20000]

Texts are random word sequences of about 150 characters in one language, a tenth of them altered copies. `datasketch` is
measured when it is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from schemas.config import RunConfig
from schemas.config.sources import Source
from stages.contract import Context, Silent
from stages.data import data_path
from stages.prompts.duplicates import Deduplicator, keys_of
from stages.prompts.stage import Prompts
from stages.sources import read_rows
from stages.text.language import identify


def texts(count: int) -> list[str]:
    """Random sequences of the words of the shipped English prompts; every tenth repeats the one before with one change."""
    rng = random.Random(0)
    lines = data_path("prompts/en.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for line in lines for word in json.loads(line)["prompt"].split()]
    made: list[str] = []
    for i in range(count):
        made.append(made[-1] + " please" if i % 10 == 9 else " ".join(rng.choices(words, k=25)))
    return made


def rensa_lsh(ids: list[str], rows: list[str]) -> int:
    """The stage's near-duplicate rule."""
    deduplicator = Deduplicator(0.8)
    return sum(deduplicator.check(i, key) is None for i, key in zip(ids, keys_of(rows, rows, True), strict=True))


def datasketch_lsh(rows: list[str]) -> int:
    """The same near-duplicate rule with datasketch."""
    from datasketch import MinHash, MinHashLSH

    index, kept = MinHashLSH(threshold=0.8, num_perm=128), 0
    for i, text in enumerate(rows):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([text[j : j + 5].encode() for j in range(len(text) - 4)])
        if not index.query(sketch):
            index.insert(i, sketch)
            kept += 1
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20000)
    count = parser.parse_args().rows
    rows = texts(count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text, "language": "en"}) + "\n" for text in rows))
        config = RunConfig.model_validate(
            {
                "name": "benchmark",
                "languages": {"seen": ["en"]},
                "model": {"policy": "none"},
                "prompts": {"sources": [{"path": str(path)}]},
            }
        )
        ids = [str(i) for i in range(count)]
        measured: dict[str, Callable[[], object]] = {
            "reading alone": lambda: sum(len(b.rows) for b in read_rows(Source(path=str(path)), ["en"], ["prompt"])),
            "language identification alone": lambda: identify(rows, ["en"]),
            "duplicates alone (rensa)": lambda: rensa_lsh(ids, rows),
            "duplicates alone (datasketch)": lambda: datasketch_lsh(rows),
            "prompts stage": lambda: list(Prompts().run(Context(config, 0, {}, {}, Silent()))),
        }
        identify(["warm up"], ["en"])
        for name, work in measured.items():
            begun = time.perf_counter()
            try:
                work()
            except ImportError:
                print(f"{name:32} not installed")
                continue
            print(f"{name:32} {count / (time.perf_counter() - begun):10,.0f} rows/s")


if __name__ == "__main__":
    main()
