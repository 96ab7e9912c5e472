"""Generate: N answers per prompt from the round's policy (docs/methods.md section 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from schemas.ids import content_id, seed_for
from schemas.languages import UNKNOWN
from schemas.tables import TABLES
from stages.contract import Context, Drop, Part, Shard, ShardStage, tally
from stages.engines import shared_engine
from stages.engines.base import Completion, Engine, Request
from stages.engines.replies import Asked, Usage, asked, tell_cost
from stages.engines.sharded import OpenShard, Results, run_shards
from stages.text.language import identify
from stages.text.render import Renderer, RenderError, check_thoughts, refuse_channels


class Generate(ShardStage):
    """prompts -> candidates.

    Unit `prompt`: kept = prompts with all their candidates. Dropped: held_out_frozen (after round 0 only the train
    split is answered again), prompt_too_long. Failed: cannot_render, engine_error.
    Raises UserError where thoughts are to be kept and the template leaves them out of what would be learnt, and for templates
    of channels.
    Candidate i of a prompt is sampled with seed_for(run seed, round, prompt_id, i).
    """

    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """See ShardStage.run."""
        engine = asked(shared_engine(ctx, "policy"), ctx)
        check_thoughts(engine.renderer, ctx.config.text.thoughts)
        refuse_channels(engine.renderer)
        try:
            yield from run_shards(engine, shards, lambda shard: _open(ctx, engine, shard), ctx.progress)
        finally:
            if isinstance(engine, Asked):
                ctx.progress.note(engine.told())


def _open(ctx: Context, engine: Engine, shard: Shard) -> OpenShard:
    rows = shard.rows.to_pylist()
    drops: dict[str, Drop] = {}
    requests: dict[str, list[Request]] = {}
    opened: dict[str, str] = {}  # prompts after which a thinking template has begun the thought: part of the answer
    for row in rows:
        ids = _prompt_ids(ctx, engine, row)
        if isinstance(ids, Drop):
            drops[row["prompt_id"]] = ids
        else:
            requests[row["prompt_id"]] = [
                Request(
                    id=f"{shard.index}/{row['prompt_id']}/{index}",
                    prompt_ids=ids,
                    sampling=ctx.config.generate.sampling,
                    seed=seed_for(ctx.config.seed, ctx.round, row["prompt_id"], index),
                    group=shard.index,
                )
                for index in range(ctx.config.generate.candidates)
            ]
            if mark := engine.renderer.opened_thought(ids):
                opened[row["prompt_id"]] = mark
    everything = [request for of_row in requests.values() for request in of_row]
    tariff = engine.tariff if isinstance(engine, Asked) else None
    if isinstance(engine, Asked):
        tell_cost(ctx, "prompts", shard, {engine: everything})

    def finish(results: Results) -> Part:
        part = _part(ctx, engine, shard.index, rows, drops, opened, results)
        part.stats["prompt_tokens"] = float(sum(len(request.prompt_ids) for request in everything))
        if tariff is not None and tariff.priced:
            part.stats["cost"] = Usage.of(everything, [c for row in requests for c in results[row]]).cost(tariff)
        return part

    return OpenShard(requests, settled=len(drops), finish=finish)


def _prompt_ids(ctx: Context, engine: Engine, row: dict[str, Any]) -> list[int] | Drop:
    """The prompt's ids, or why it is not answered."""
    where = {"unit": "prompt", "row_id": row["prompt_id"], "language": row["language"]}
    sampling = ctx.config.generate.sampling
    if ctx.round > 0 and row["split"] != "train":
        return Drop(**where, reason="held_out_frozen", detail=f"split {row['split']}")
    try:
        ids = engine.renderer.prompt_ids(row["messages"], sampling.system_prompt)
    except RenderError as error:
        return Drop(**where, reason="cannot_render", detail=str(error), failed=True)
    limit = min(engine.context_length, ctx.config.text.max_length)
    if len(ids) + sampling.max_tokens > limit:
        detail = f"{len(ids)} tokens + max_tokens {sampling.max_tokens} > {limit}"
        return Drop(**where, reason="prompt_too_long", detail=detail)
    return ids


def _part(
    ctx: Context,
    engine: Engine,
    index: int,
    rows: list[dict[str, Any]],
    drops: dict[str, Drop],
    opened: dict[str, str],
    results: Results,
) -> Part:
    candidates: list[dict[str, Any]] = []
    marks = 0
    for row in rows:
        completions = results.get(row["prompt_id"], [])
        error = next((c.error for c in completions if c.finish_reason not in ("stop", "length")), None)
        if error is not None:
            drops[row["prompt_id"]] = Drop(
                "prompt", row["prompt_id"], row["language"], "engine_error", error, failed=True
            )
            continue
        for number, completion in enumerate(completions):
            answer, mark = completion.text.strip(), opened.get(row["prompt_id"])
            if mark and not answer.startswith(mark):  # some models and servers say the mark again
                answer = f"{mark}\n{answer}"
            text, broken = engine.renderer.neutral_answer(answer)
            marks += broken
            candidates.append(_candidate(ctx.round, row, number, text, completion))
    _add_languages(ctx, engine.renderer, candidates)
    return Part(
        index=index,
        tables={"candidates": pa.Table.from_pylist(candidates, schema=TABLES["candidates"].schema)},
        tallies=tally("prompt", [row["language"] for row in rows], drops.values()),
        drops=list(drops.values()),
        stats={
            "generated_tokens": float(sum(c["n_tokens"] for c in candidates)),
            "neutralised_marks": float(marks),
        },
    )


def _candidate(round_: int, row: dict[str, Any], index: int, text: str, completion: Completion) -> dict[str, Any]:
    return {
        "candidate_id": content_id(row["prompt_id"], round_, index, text),
        "prompt_id": row["prompt_id"],
        "round": round_,
        "index": index,
        "text": text,
        "n_tokens": completion.n_tokens,
        "finish_reason": completion.finish_reason,
        "language": row["language"],
    }


def _add_languages(ctx: Context, renderer: Renderer, candidates: list[dict[str, Any]]) -> None:
    """Identify the language of what each answer says, thoughts aside; `und` when identification is off."""
    languages = ctx.config.languages
    found = [(UNKNOWN, 0.0)] * len(candidates)
    if languages.identify:
        found = identify([renderer.thoughts.said(row["text"]) for row in candidates], languages.codes)
    for row, (language, confidence) in zip(candidates, found, strict=True):
        row["detected_language"], row["language_confidence"] = language, confidence
