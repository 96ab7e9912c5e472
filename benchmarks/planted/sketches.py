"""Sketches of the planted pairs, made once by the pipeline's own pairs and gradients stages.

The pairs of all contrasts are one imported preference set of an ordinary run, question after question, so that what is
committed so far always holds the same questions in every contrast and language. The run is resumed like any other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from torch import Tensor

from schemas.sketches import scan_numbers
from stages.gradients.store import unpack_sketches

_ROOT = Path(__file__).resolve().parents[2]
_RUN = "sketches"
_SYSTEM = "Answer briefly."
"""Instead of a template's own system message, which may be longer than the questions."""


def messages(prompt: str) -> list[dict[str, str]]:
    """The conversation a question is asked in."""
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]


@dataclass(frozen=True)
class Sketches:
    """Sketches of one contrast, question-major: row q * L + l is question q in language l.

    frame: group_id, kind, error, language, prompt, chosen, rejected and the scalars of the gradients table.
    sketch_ND: sketches of d, float32. languages: in the order of l.
    """

    frame: pl.DataFrame
    sketch_ND: Tensor
    languages: list[str]

    def of(self, languages: Sequence[str], questions: int) -> Sketches:
        """The first questions in some of the languages."""
        order = pl.DataFrame({"language": list(languages), "place": range(len(languages))})
        frame = self.frame.with_row_index("row").join(order, on="language").sort("group_id", "place")
        frame = frame.head(questions * len(languages))
        return Sketches(frame.drop("row", "place"), self.sketch_ND[frame["row"].to_list()], list(languages))


def make(
    work: Path,
    model: str,
    languages: Sequence[str],
    pairs: Mapping[str, Sequence[Mapping[str, str]]],
    seed: int,
    dtype: str = "auto",
    threads: int = 0,
    asked: Callable[[str], list[dict[str, str]]] = messages,
) -> int:
    """Write the pairs and bring the run up to date as far as the gradients; its progress goes to the terminal.

    pairs: contrast -> its pairs, as `benchmarks.planted.texts.make_pairs` gives them; asked: a prompt's conversation. The same call continues a run that was stopped.
    Returns the exit code of the pipeline.
    """
    contrasts = list(pairs)
    rows: list[dict[str, Any]] = [
        {**row, "contrast": contrast, "messages": asked(row["prompt"])}
        for contrast in contrasts
        for row in pairs[contrast]
    ]
    rows.sort(key=lambda row: str(row["group_id"]))  # stable: contrasts and languages stay in order inside a question
    work.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (work / "pairs.jsonl").write_text(lines, encoding="utf-8")
    config = {
        "name": _RUN,
        "run_dir": str(work.resolve()),
        "seed": seed,
        "languages": {"seen": list(languages), "identify": False},
        "model": {"policy": model, "dtype": dtype},
        "text": {"max_length": 512},
        "pairs": {
            "sources": [{"path": str((work / "pairs.jsonl").resolve()), "fields": {"prompt": "messages"}}],
            "dev_fraction": 0.0,
            "test_fraction": 0.0,
        },
        "gradients": {"shard_size": 2 * len(contrasts) * len(languages), "token_budget": 1024},
        "execution": {"threads": threads},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "pipeline", "run", str((work / "config.yaml").resolve()), "--until", "gradients"]
    return subprocess.run(command, cwd=_ROOT, check=False).returncode


def gradient_files(work: Path) -> list[Path]:
    """The committed parts of the gradients table. Raises FileNotFoundError before the first commit."""
    folder = work / _RUN / "round-0" / "gradients"
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no sketches in {folder}: the run has committed nothing yet")
    return files


def read(work: Path, contrasts: Sequence[str]) -> dict[str, Sketches]:
    """What is committed so far, per contrast, cut to the questions that are there in every contrast and language.

    Raises FileNotFoundError before the first commit.
    """
    run = work / _RUN / "round-0"
    files = gradient_files(work)
    pairs = pl.scan_parquet(run / "pairs" / "*.parquet").select(
        "pair_id",
        *(pl.col(side).list.last().struct.field("content").alias(side) for side in ("prompt", "chosen", "rejected")),
    )
    pairs = pairs.with_columns(pl.col("prompt").str.strip_prefix(f"{_SYSTEM}\n\n"))  # a template without a system role
    asked = pl.scan_ndjson(work / "pairs.jsonl")
    gradients = scan_numbers(files).drop("group_id")
    texts = ["language", "prompt", "chosen", "rejected"]
    frame = gradients.join(pairs, on="pair_id").join(asked, on=texts).collect()
    languages = list(dict.fromkeys(asked.select("language").collect()["language"]))
    whole = (
        frame.group_by("group_id")
        .len()
        .filter(pl.col("len") == len(languages) * asked.select(pl.col("contrast").n_unique()).collect().item())
    )
    order = pl.DataFrame({"language": languages, "place": range(len(languages))})
    frame = (
        frame.join(whole, on="group_id", how="semi").join(order, on="language").sort("group_id", "place").drop("place")
    )
    found = {}
    for contrast in contrasts:
        part = frame.filter(pl.col("contrast") == contrast)
        stored_ND = torch.from_numpy(part["sketch"].to_numpy().astype(np.float32))
        norm_N = torch.from_numpy(part["norm"].to_numpy().copy())
        found[contrast] = Sketches(part.drop("sketch"), unpack_sketches(stored_ND, norm_N), languages)
    return found
