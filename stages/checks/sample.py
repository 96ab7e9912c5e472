"""Generate and judge a few prompts with the run's own stages, to see them work and to time them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import RunConfig
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.checks.examples import prompts
from stages.checks.finding import Finding
from stages.contract import Context, ModelRef, Part, Shard, Silent
from stages.engines import close_engines, shared_engine
from stages.generate.stage import Generate
from stages.judge.stage import Judge
from stages.models.device import device_of

_TOKENS = 32
_PROMPTS = {"cpu": 6, "cuda": 96}
"""A GPU answers many at once: fewer would measure nothing but its waiting."""


def sample_findings(models: Mapping[str, ModelRef], config: RunConfig, folder: Path) -> Iterator[Finding]:
    """Load the engine, answer a few prompts, judge the answers. models: by role. folder: for the sample's tables.

    Answers are cut at 32 tokens; times are then those of full length, so an upper bound for models that stop earlier.
    """
    longest = config.generate.sampling.max_tokens
    sampling = config.generate.sampling.model_copy(update={"max_tokens": min(longest, _TOKENS)})
    generate = config.generate.model_copy(update={"sampling": sampling, "candidates": 2})
    said: list[str] = []
    ctx = Context(config.model_copy(update={"generate": generate}), 0, {}, dict(models), Silent(said.append))
    rows = _rows(config)
    path = folder / "prompts.parquet"
    pq.write_table(rows, path)
    ctx.inputs = {"prompts": [path]}
    try:
        begun = time.monotonic()
        shared_engine(ctx, "policy")
        loading = time.monotonic() - begun
        (part,), seconds = _timed(Generate().run(ctx, iter([Shard(0, rows)])))
        candidates = part.tables["candidates"]
        yield _outcome("generate", part, rows.num_rows, seconds, loading, candidates.num_rows, longest)
        if candidates.num_rows:
            pq.write_table(candidates, folder / "candidates.parquet")
            ctx.inputs = {"prompts": [path], "candidates": [folder / "candidates.parquet"]}
            (judged,), seconds = _timed(Judge().run(ctx, iter([Shard(0, candidates)])))
            yield _outcome("judge", judged, candidates.num_rows, seconds, 0.0, candidates.num_rows, 0)
    finally:
        close_engines(ctx)
    for note in said:
        yield Finding("engine", "warning", note, "It was dealt with, and will be again in the run.")


def _timed(parts: Iterator[Part]) -> tuple[list[Part], float]:
    begun = time.monotonic()
    return list(parts), time.monotonic() - begun


def _outcome(
    stage: str, part: Part, rows_in: int, seconds: float, loading: float, answers: int, longest: int
) -> Finding:
    """What became of the sample, and the seconds an answer takes (generate: at full length)."""
    kept = sum(t.kept for t in part.tallies)
    tokens = part.stats.get("generated_tokens", 0.0)
    each = seconds / max(answers, 1)
    if tokens and answers:
        each = max(each, longest * seconds / tokens)
    values: dict[str, float | str] = {"seconds_per_answer": each, "loading_seconds": loading}
    rate = f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
    engine = f" after {loading:.0f} s of loading" if loading else ""
    unit = part.tallies[0].unit if part.tallies else "row"
    what = f"{kept} of {rows_in} sample {unit}s kept in {seconds:.1f} s{engine}{rate}"
    reasons = sorted({f"{drop.reason} ({drop.detail})" for drop in part.drops})
    if not reasons:
        return Finding(stage, "ok", what, values=values)
    failed = kept == 0 or any(drop.failed for drop in part.drops)
    fix = f"Dropped or failed: {'; '.join(reasons[:3])}"
    return Finding(stage, "problem" if failed else "warning", what, fix, values)


def _rows(config: RunConfig) -> pa.Table:
    """A prompts table of shipped prompts in the run's languages."""
    seen = [code for code in config.languages.seen if prompts(code, 1)] or ["en"]
    wanted = _PROMPTS[device_of(config).type]
    each = -(-wanted // len(seen))
    texts = [(language, text) for language in seen for text in prompts(language, each)]
    rows = []
    for number, (language, text) in enumerate(texts[:: max(1, len(texts) // wanted)][:wanted]):
        messages = [{"role": "user", "content": text}]
        prompt_id = content_id(language, messages)
        rows.append(
            {
                "prompt_id": prompt_id,
                "group_id": prompt_id,
                "language": language,
                "split": "train",
                "messages": messages,
                "language_confidence": 1.0,
                "source": "doctor",
                "source_row": number,
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["prompts"].schema)
