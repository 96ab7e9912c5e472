"""Which of two answers is better: prompt and reading of the one-letter reply. Ask in both orders and average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.judge.answer_tokens import AnswerTokens, answer_masses, answer_tokens
from stages.judge.fence import fenced, task_text
from stages.judge.rubric import Rubric


def pairwise_prompt(
    rubric: Rubric, messages: Sequence[Mapping[str, str]], answer_a: str, answer_b: str
) -> list[dict[str, str]]:
    """The conversation the judge answers with A or B."""
    texts, task = rubric.pairwise, task_text(messages)
    content = "\n\n".join(
        [
            texts.instructions.strip(),
            f"{texts.prompt_label}:\n{fenced('task', task)}",
            f"{texts.answer_a_label}:\n{fenced('answer', answer_a, task, 'A')}",
            f"{texts.answer_b_label}:\n{fenced('answer', answer_b, task, 'B')}",
            texts.ask.strip(),
        ]
    )
    return [{"role": "user", "content": content}]


def choice_tokens(tokenizer: Any) -> AnswerTokens:
    """A and B -> their token ids. Raises UserError when one is several tokens."""
    return answer_tokens(tokenizer, ["A", "B"])


def probability_of_a(logprobs: Mapping[int, float], tokens: AnswerTokens) -> tuple[float | None, float]:
    """(p(A) / (p(A) + p(B)), mass on A and B); the first is None when the mass is 0."""
    masses = answer_masses(logprobs, tokens)
    mass = sum(masses.values())
    return (masses["A"] / mass if mass > 0 else None), min(mass, 1.0)
