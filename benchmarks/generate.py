"""Tokens per second of the generate stage over shards against one bare LLM.generate call over the same requests.

    python benchmarks/generate.py [--model NAME] [--prompts 48] [--candidates 3] [--max-tokens 48] [--shard-size 8]

Two vLLM engines with the same settings: the stage's, in a process of its own as in a run, and one in this process; the
same token ids, seeds and sampling. Our side is the whole stage: rendering, streaming to the engine's process and back, language
identification, parts built as shards complete. The two alternate --repeats times after one warm-up, each time with
other prompts, so that neither finds a prefix in its cache; the best run of each counts, since other work only adds time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from schemas.config import RunConfig
from schemas.ids import content_id, seed_for
from schemas.tables import TABLES
from stages.contract import Context, Shard, Silent
from stages.engines import shared_engine
from stages.engines.vllm import VllmEngine, load
from stages.generate.stage import Generate
from stages.models.resolve import resolve

LANGUAGES = ["en", "de", "es", "fr", "ru", "zh"]


def prompts(first: int, count: int) -> list[dict[str, Any]]:
    """Rows of the prompts table from the `first` on, from the shipped prompts, languages in turn."""
    lines = {
        code: files("data").joinpath(f"prompts/{code}.jsonl").read_text("utf-8").splitlines() for code in LANGUAGES
    }
    rows = []
    for number in range(first, first + count):
        code = LANGUAGES[number % len(LANGUAGES)]
        entry = json.loads(lines[code][number // len(LANGUAGES) % len(lines[code])])
        rows.append(
            {
                "prompt_id": content_id(code, entry["prompt"], number),
                "group_id": f"g{number}",
                "language": code,
                "split": "train",
                "messages": [{"role": "user", "content": entry["prompt"]}],
                "language_confidence": 1.0,
                "source": "benchmark",
                "source_row": number,
            }
        )
    return rows


def staged(ctx: Context, rows: list[dict[str, Any]], size: int) -> tuple[int, float, list[float]]:
    """(generated tokens, seconds, when each part was ready) of the generate stage."""

    def shards() -> Iterator[Shard]:
        for index, start in enumerate(range(0, len(rows), size)):
            yield Shard(index, pa.Table.from_pylist(rows[start : start + size], schema=TABLES["prompts"].schema))

    begun, tokens, ready = time.perf_counter(), 0, []
    for part in Generate().run(ctx, shards()):
        tokens += int(part.stats["generated_tokens"])
        ready.append(time.perf_counter() - begun)
    return tokens, time.perf_counter() - begun, ready


def bare(ctx: Context, engine: VllmEngine, rows: list[dict[str, Any]]) -> tuple[int, float]:
    """(generated tokens, seconds) of one LLM.generate call."""
    import vllm

    sampling, inputs, parameters = ctx.config.generate.sampling, [], []
    for row in rows:
        ids = engine.renderer.prompt_ids(row["messages"])
        for index in range(ctx.config.generate.candidates):
            inputs.append({"prompt_token_ids": ids})
            parameters.append(
                vllm.SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=seed_for(ctx.config.seed, ctx.round, row["prompt_id"], index),
                )
            )
    begun = time.perf_counter()
    outputs = engine._llm.generate(inputs, parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs), time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "languages": {"seen": LANGUAGES},
            "model": {"policy": arguments.model},
            "text": {"max_length": 1024},
            "prompts": {"sources": [{"path": "unused.jsonl"}]},
            "engine": {"max_num_seqs": arguments.max_num_seqs, "enforce_eager": True},
            "generate": {"candidates": arguments.candidates, "sampling": {"max_tokens": arguments.max_tokens}},
        }
    )
    ctx = Context(config, 0, {}, {"policy": resolve(arguments.model)}, Silent(print))
    engine = load(ctx.models["policy"], config)
    warm = prompts(0, arguments.shard_size)
    staged(ctx, warm, arguments.shard_size)
    bare(ctx, engine, warm)
    ours, theirs = 0.0, 0.0
    for repeat in range(arguments.repeats):
        rows = prompts(arguments.shard_size + repeat * arguments.prompts, arguments.prompts)
        tokens, seconds, ready = staged(ctx, rows, arguments.shard_size)
        ours = max(ours, tokens / seconds)
        print(f"stage        {tokens} tokens in {seconds:.1f} s = {tokens / seconds:.1f} tokens/s; ", end="")
        print(f"{len(ready)} parts, the first after {min(ready):.1f} s")
        tokens, seconds = bare(ctx, engine, rows)
        theirs = max(theirs, tokens / seconds)
        print(f"LLM.generate {tokens} tokens in {seconds:.1f} s = {tokens / seconds:.1f} tokens/s")
    shared_engine(ctx, "policy").close()
    print(f"ratio {ours / theirs:.3f} (aim: at least 0.95)")


if __name__ == "__main__":
    main()
