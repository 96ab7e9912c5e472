"""Expected score: one forward pass, E[s] = sum k p(k) / sum p(k) over the scores 0 to 5 (METHODS.md section 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.judge.answer_tokens import AnswerTokens, answer_masses, answer_tokens
from stages.judge.fence import fenced, task_text
from stages.judge.rubric import ScoreTexts

SCORES = range(6)


def score_prompt(texts: ScoreTexts, messages: Sequence[Mapping[str, str]], answer: str) -> list[dict[str, str]]:
    """The conversation the judge answers: rubric, task, answer, question, in this order for prefix caching."""
    content = "\n\n".join(
        [
            texts.instructions.strip(),
            f"{texts.prompt_label}:\n{fenced('task', task_text(messages))}",
            f"{texts.answer_label}:\n{fenced('answer', answer, task_text(messages))}",
            texts.ask.strip(),
        ]
    )
    return [{"role": "user", "content": content}]


def score_tokens(tokenizer: Any) -> AnswerTokens:
    """Score -> its token ids. Raises UserError when a score is several tokens."""
    return answer_tokens(tokenizer, [str(score) for score in SCORES])


def expected_score(logprobs: Mapping[int, float], tokens: AnswerTokens) -> tuple[float | None, float]:
    """(E[s] in [0, 5], probability mass on the score tokens); E[s] is None when the mass is 0."""
    masses = answer_masses(logprobs, tokens)
    mass = sum(masses.values())
    if mass <= 0:
        return None, 0.0
    return sum(int(score) * p for score, p in masses.items()) / mass, min(mass, 1.0)
