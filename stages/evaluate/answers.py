"""Held-out prompts answered by a model, greedily by default, and whether the answers keep to the prompt's language."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from schemas.config.model import EngineConfig
from schemas.ids import content_id, seed_for
from schemas.languages import UNKNOWN
from schemas.tables import TABLES
from stages.contract import Context, Drop, Stopped
from stages.engines import Wanted, shared_engine, shared_engines
from stages.engines.base import Completion, Engine, Request
from stages.engines.replies import Asked, Usage, asked, estimate
from stages.evaluate.heldout import HeldOutPrompt
from stages.evaluate.metrics import Measurement
from stages.text.language import identify, same_language, unidentifiable
from stages.text.refusals import refusal, without_phrases
from stages.text.render import Renderer, RenderError
from stages.text.repetition import repetition

_SCHEMA = pa.schema([("row_id", pa.string()), ("text", pa.string()), ("finish_reason", pa.string())])


def requests_for(
    ctx: Context, renderer: Renderer, prompts: Sequence[HeldOutPrompt]
) -> tuple[list[Request], list[Drop]]:
    """One request a prompt, and the prompts that cannot be asked: prompt_too_long; failed: cannot_render."""
    sampling, longest = ctx.config.evaluate.sampling, ctx.config.text.max_length
    requests, drops = [], []
    for prompt in prompts:
        try:
            ids = renderer.prompt_ids(prompt.prompt, sampling.system_prompt)
        except RenderError as error:
            drops.append(Drop("prompt", prompt.row_id, prompt.language, "cannot_render", str(error), failed=True))
            continue
        if len(ids) + sampling.max_tokens > longest:
            detail = f"{len(ids)} tokens + max_tokens {sampling.max_tokens} > {longest}"
            drops.append(Drop("prompt", prompt.row_id, prompt.language, "prompt_too_long", detail))
            continue
        seed = seed_for(ctx.config.seed, "evaluate", prompt.row_id)
        requests.append(Request(prompt.row_id, ids, sampling, seed))
    return requests, drops


def identity(ctx: Context, role: str, requests: Sequence[Request], own: EngineConfig | None = None) -> str:
    """What the completions depend on. own: the engine, where it is not the run's."""
    rows = [(r.id, r.prompt_ids, r.sampling.model_dump(), r.seed, r.score_tokens) for r in requests]
    of = own or ctx.config.engine
    engine = (of.kind, of.batch_size, ctx.config.model.dtype, *([of.base_url, of.served_model] if own else []))
    return content_id("completions", ctx.models[role].digest, engine, rows)


def complete(
    ctx: Context, role: str, requests: Sequence[Request], own: EngineConfig | None = None
) -> Iterator[Completion]:
    """Completions from the shared engine (progress: one a request), or from one of its `own`. Raises Stopped when asked to stop."""
    if not requests:
        return
    engine = _engine(ctx, role, own)
    begun, tokens = time.monotonic(), 0
    try:
        for completion in engine.stream(iter(requests)):
            tokens += completion.n_tokens
            ctx.progress.advance(1, tokens_per_s=tokens / max(time.monotonic() - begun, 1e-9))
            yield completion
            if ctx.stop():
                raise Stopped
    finally:
        if isinstance(engine, Asked):
            ctx.progress.note(engine.told())


def tell_cost(ctx: Context, role: str, requests: Sequence[Request], own: EngineConfig) -> None:
    """Before anything is asked: what a server is going to be, where the model runs behind one."""
    engine = _engine(ctx, role, own)
    if isinstance(engine, Asked):
        ctx.progress.note(estimate(engine.tariff, Usage.at_most(engine.unknown(requests))))


def _engine(ctx: Context, role: str, own: EngineConfig | None) -> Engine:
    """A server's replies are kept as they come."""
    if own is None:
        return shared_engine(ctx, role)
    return asked(shared_engines(ctx, [Wanted(role, engine=own)])[0], ctx)


def answer(ctx: Context, role: str, renderer: Renderer, requests: Sequence[Request]) -> pa.Table:
    """The model's answers, without thoughts, in the order of the requests; finish_reason is error where there is none (text: why)."""
    found = {}
    opened = {request.id: renderer.opened_thought(request.prompt_ids) for request in requests}
    for completion in complete(ctx, role, requests):
        text = (
            completion.error
            or renderer.neutralise(renderer.thoughts.said(opened.get(completion.id, "") + completion.text))[0]
        )
        found[completion.id] = {"row_id": completion.id, "text": text, "finish_reason": completion.finish_reason}
    return pa.Table.from_pylist([found[request.id] for request in requests], schema=_SCHEMA)


def answer_rows(
    ctx: Context, model: str, prompts: Iterable[HeldOutPrompt], answers: pa.Table
) -> tuple[list[dict[str, Any]], list[Drop]]:
    """(rows of the answers table, drops of prompts the engine failed on)."""
    by_id = {prompt.row_id: prompt for prompt in prompts}
    rows, drops = [], []
    for row in answers.to_pylist():
        prompt = by_id[row["row_id"]]
        if row["finish_reason"] not in ("stop", "length"):
            drops.append(Drop("prompt", prompt.row_id, prompt.language, "engine_error", row["text"], failed=True))
            continue
        rows.append(
            {
                "model": model,
                "prompt_id": prompt.row_id,
                "language": prompt.language,
                "split": prompt.split,
                "messages": prompt.prompt,
                "text": row["text"],
                "finish_reason": row["finish_reason"],
            }
        )
    for row, language in zip(rows, _languages(ctx, [row["text"] for row in rows]), strict=True):
        row["detected_language"] = language
    return rows, drops


def answers_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as the answers table."""
    return pa.Table.from_pylist(rows, schema=TABLES["answers"].schema)


def measure(ctx: Context, prompts: Iterable[HeldOutPrompt], rows: Iterable[dict[str, Any]]) -> Iterator[Measurement]:
    """The items of answer_language (languages the identifier knows), truncated, empty, repetition, refused (languages with a list of
    phrases) and characters."""
    groups = {prompt.row_id: prompt.group_id for prompt in prompts}
    run = ctx.config.languages
    unknown = set(unidentifiable(run.codes))
    unlisted = set(without_phrases(run.codes))
    for row in rows:
        where = row["model"], row["split"], row["language"]
        group = groups[row["prompt_id"]]
        yield Measurement(*where, "truncated", group, float(row["finish_reason"] == "length"))
        yield Measurement(*where, "empty", group, float(not row["text"].strip()))
        yield Measurement(*where, "repetition", group, repetition(row["text"]))
        yield Measurement(*where, "characters", group, float(len(row["text"])))
        if row["language"] not in unlisted:
            yield Measurement(*where, "refused", group, float(bool(refusal(row["text"], row["language"]))))
        if run.identify and row["language"] not in unknown:
            kept = row["detected_language"] != UNKNOWN and same_language(row["detected_language"], row["language"])
            yield Measurement(*where, "answer_language", group, float(kept))


def _languages(ctx: Context, texts: list[str]) -> list[str]:
    run = ctx.config.languages
    if not run.identify:
        return [UNKNOWN] * len(texts)
    return [language for language, _ in identify(texts, run.codes)]
