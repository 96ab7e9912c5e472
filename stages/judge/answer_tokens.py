"""Reading a judge's one-token answer from next-token log-probabilities."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from schemas.errors import UserError

AnswerTokens = dict[str, tuple[int, ...]]


def answer_tokens(tokenizer: Any, answers: Sequence[str]) -> AnswerTokens:
    """Answer -> ids of all single tokens that read as it: with or without a space before, digits of any script.

    Raises UserError when an answer is several tokens for this tokenizer.
    """
    found: dict[str, list[int]] = {answer: [] for answer in answers}
    for token, token_id in tokenizer.get_vocab().items():
        if len(token) > 8 or token_id in tokenizer.added_tokens_decoder:
            continue
        text = tokenizer.decode([token_id]).strip(" ")
        if len(text) == 1:
            digit = unicodedata.decimal(text, None)
            text = text if digit is None else str(digit)
        if text in found:
            found[text].append(token_id)
    missing = [answer for answer, ids in found.items() if not ids]
    if missing:
        raise UserError(
            f"The judge's tokenizer has no single token for {', '.join(missing)}",
            where="model.judge",
            fix="Use judge.method: additive, or a judge whose tokenizer has digits and letters as tokens of their own.",
        )
    return {answer: tuple(sorted(ids)) for answer, ids in found.items()}


def lead_in_ids(tokenizer: Any, lead_in: str, tokens: AnswerTokens) -> list[int]:
    """Ids of the answer's beginning, cut so that the next token is the answer itself.

    Tokenizers differ in whether the space before an answer is a token of its own or part of the answer's: both
    spellings, with and without a space, are tokenised, and the one is taken whose last token is the answer for all of them.
    """
    for space in (" ", ""):
        spelled = {
            answer: tokenizer(lead_in + space + answer, add_special_tokens=False)["input_ids"] for answer in tokens
        }
        beginnings = {tuple(ids[:-1]) for ids in spelled.values()}
        if len(beginnings) == 1 and all(ids[-1] in tokens[answer] for answer, ids in spelled.items()):
            return list(beginnings.pop())
    return list(tokenizer(lead_in, add_special_tokens=False)["input_ids"])


def all_ids(tokens: AnswerTokens) -> tuple[int, ...]:
    """Every id, for Request.score_tokens."""
    return tuple(sorted({token_id for ids in tokens.values() for token_id in ids}))


def answer_masses(logprobs: Mapping[int, float], tokens: AnswerTokens) -> dict[str, float]:
    """Answer -> probability of it as the next token; 0 for tokens a server did not report."""
    return {answer: sum(math.exp(logprobs[i]) for i in ids if i in logprobs) for answer, ids in tokens.items()}
