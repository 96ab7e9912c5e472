"""Expected score: one forward pass, E[s] = sum k p(k) / sum p(k) over the scores 0 to 5 (docs/methods.md section 1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stages.judge.answer_tokens import AnswerTokens, answer_masses, answer_tokens, lead_in_ids
from stages.judge.fence import fenced, task_text, without_scores
from stages.judge.rubric import ScoreTexts
from stages.text.render import Renderer

SCORES = range(6)
_SENTENCE_END = re.compile(r"[.!?。．！？।؟]\s*")


def score_prompt(texts: ScoreTexts, messages: Sequence[Mapping[str, str]], answer: str) -> list[dict[str, str]]:
    """The conversation the judge answers: rubric, task, answer, question, in this order for prefix caching.

    Neither task nor answer can close its fence, or hold a line that looks like the judge's own reply.
    """
    task, shown = (without_scores(text, _lead_in(texts)) for text in (task_text(messages), answer))
    content = "\n\n".join(
        [
            texts.instructions.strip(),
            f"{texts.prompt_label}:\n{fenced('task', task)}",
            f"{texts.answer_label}:\n{fenced('answer', shown, task)}",
            texts.ask.strip(),
        ]
    )
    return [{"role": "user", "content": content}]


def _lead_in(texts: ScoreTexts) -> str:
    """The last words of `ask`, for example "Score (0-5):"."""
    return [part for part in _SENTENCE_END.split(texts.ask.strip()) if part.strip()][-1].strip()


def score_tokens(tokenizer: Any) -> AnswerTokens:
    """Score -> its token ids. Raises UserError when a score is several tokens."""
    return answer_tokens(tokenizer, [str(score) for score in SCORES])


def score_ids(
    renderer: Renderer,
    texts: ScoreTexts,
    messages: Sequence[Mapping[str, str]],
    answer: str,
    tokens: AnswerTokens,
    system_prompt: str | None = None,
) -> list[int]:
    """Ids after which the next token is the score: the rendered prompt and the last words of `ask` ("Score (0-5):").

    Without these words in the judge's mouth a small model put 3% (Swahili) to 99.9% (English) of its probability on
    the score tokens; with them 98% or more in all thirteen languages of data/rubrics (Qwen2.5-Coder-0.5B-Instruct).
    Raises RenderError like `Renderer.prompt_ids`.
    """
    prompt = renderer.prompt_ids(score_prompt(texts, messages, answer), system_prompt)
    return prompt + lead_in_ids(renderer.tokenizer, _lead_in(texts), tokens)


def expected_score(logprobs: Mapping[int, float], tokens: AnswerTokens) -> tuple[float | None, float]:
    """(E[s] in [0, 5], probability mass on the score tokens); E[s] is None when the mass is 0 or not a number."""
    masses = answer_masses(logprobs, tokens)
    mass = sum(masses.values())
    if math.isnan(mass):
        return None, mass
    if mass <= 0:
        return None, 0.0
    return sum(int(score) * p for score, p in masses.items()) / mass, min(mass, 1.0)
