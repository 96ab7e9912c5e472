"""Tokenizer and chat template: round trip in every language, control tokens kept out, end of turn, lengths."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from schemas.config import RunConfig
from stages.checks.examples import prompts, shipped
from stages.checks.finding import Finding
from stages.checks.template import check_template
from stages.contract import ModelRef
from stages.engines.base import JUDGE_ROOM, context_length
from stages.text.render import Renderer, RenderError, load_renderer

_PROMPTS = 12
_TOO_LONG = 0.05


def text_findings(model: ModelRef, config: RunConfig) -> Iterator[Finding]:
    """Load the tokenizer and try it. Raises UserError when it cannot be used at all."""
    check_template(model, config.text, config.model.trust_remote_code)
    renderer = load_renderer(model, config.text, config.model.trust_remote_code)
    for note in renderer.notes:
        yield Finding("chat_template", "warning", note, "Nothing to do if that is what you want.")
    yield from _round_trips(renderer, config)
    yield _control_tokens(renderer)
    yield _end_of_turn(renderer)


def _round_trips(renderer: Renderer, config: RunConfig) -> Iterator[Finding]:
    codes = config.languages.codes
    lost: dict[str, str] = {}
    values: dict[str, float | str] = {}
    for code in codes:
        texts = prompts(code, _PROMPTS)
        tokens = 0
        for text in texts:
            ids = renderer.prompt_ids([{"role": "user", "content": text}])
            tokens += len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
            if _plain(text) not in _plain(renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
                lost.setdefault(code, text)
        if texts:
            values[code] = round(tokens / sum(map(len, texts)), 3)
    for code, text in lost.items():
        yield Finding(
            "tokenizer",
            "problem",
            f"a prompt in {code} does not come back from the tokenizer: {text[:60]!r}",
            "The model has no tokens for this script or the template changes the text: leave the language out, use "
            "another model, or give text.chat_template.",
        )
    if not lost:
        shown = ", ".join(f"{code} {value}" for code, value in values.items())
        what = f"{len(values)} of {len(codes)} languages come back unchanged; tokens per character: {shown}"
        yield Finding("tokenizer", "ok", what, values=values)


def _control_tokens(renderer: Renderer) -> Finding:
    """Every special token, written by a user, must stay text."""
    tokenizer = renderer.tokenizer
    tokens = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = set(tokens) | set(tokenizer.all_special_ids)
    texts = sorted({*tokens.values(), *tokenizer.all_special_tokens})

    def count(text: str) -> int:
        return sum(i in special for i in renderer.prompt_ids([{"role": "user", "content": text}]))

    harmless = count("word")
    bad = [token for token in texts if token.strip() and count(f"a {token} b") != harmless]
    if bad:
        return Finding(
            "special_tokens",
            "problem",
            f"{', '.join(map(repr, bad[:5]))} inside a prompt becomes a control token",
            "Report this with the model's name: prompts could speak as the system.",
        )
    return Finding("special_tokens", "ok", f"{len(texts)} special tokens stay text inside prompts")


def _end_of_turn(renderer: Renderer) -> Finding:
    name = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn)
    question = [{"role": "user", "content": "a"}]
    sides = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    try:
        ids = renderer.pair_ids(question, *sides)
    except RenderError as error:
        return Finding("end_of_turn", "problem", error.what, error.fix)
    if ids.chosen[-1] != renderer.end_of_turn or not ids.prompt:
        return Finding("end_of_turn", "problem", f"an answer does not end in {name}", "Set text.chat_template.")
    return Finding("end_of_turn", "ok", f"answers end in {name} ({renderer.end_of_turn})")


def length_findings(model: ModelRef, config: RunConfig) -> Iterator[Finding]:
    """The model's context against text.max_length and what is generated and judged."""
    from stages.models.strict import config_of  # imports torch

    trust = config.model.trust_remote_code
    hf_config = config_of(model, trust)
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    longest, context = config.text.max_length, context_length(hf_config, config)
    if limit and longest > limit:
        yield Finding(
            "context", "problem", f"text.max_length {longest} exceeds the model's context of {limit}", "Lower it."
        )
        return
    room = {}
    if config.evaluate.win_rate and config.evaluate.prompts_per_language:
        room["evaluate"] = config.evaluate.sampling.max_tokens
    if not config.imported:
        room["generate"] = config.generate.sampling.max_tokens
    renderer = load_renderer(model, config.text, trust)
    codes = config.languages.codes
    lengths = [
        len(renderer.prompt_ids([{"role": "user", "content": row["prompt"]}]))
        for code in codes
        for row in shipped("prompts", code)
    ]
    for stage, tokens in room.items():
        over = sum(length + tokens > longest for length in lengths)
        if lengths and over > _TOO_LONG * len(lengths):
            yield Finding(
                "context",
                "problem" if over == len(lengths) else "warning",
                f"{over} of {len(lengths)} shipped prompts leave no room for {stage}.sampling.max_tokens {tokens} within "
                f"text.max_length {longest}",
                f"Raise text.max_length{f' (the model takes {limit})' if limit else ''} or lower max_tokens.",
            )
    if not config.imported and context < longest + JUDGE_ROOM:
        yield Finding(
            "context",
            "warning",
            f"the model's context of {limit} leaves the judge {context - longest} tokens for its rubric "
            f"(about {JUDGE_ROOM} wanted): long answers are dropped as too_long_for_judge",
            f"Lower text.max_length to {max(16, context - JUDGE_ROOM)}, or name another judge in model.judge.",
        )
    yield Finding(
        "context", "ok", f"{context} tokens with room for the judge; model {limit}, text.max_length {longest}"
    )


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
