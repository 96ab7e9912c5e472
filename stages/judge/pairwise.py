"""Which of two answers is better: prompt and reading of the one-letter reply. Ask in both orders and average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from stages.judge.answer_tokens import AnswerTokens, answer_masses, answer_tokens, lead_in_ids
from stages.judge.fence import fenced, task_text
from stages.judge.rubric import Rubric
from stages.text.render import Renderer


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


def pairwise_ids(
    renderer: Renderer,
    rubric: Rubric,
    messages: Sequence[Mapping[str, str]],
    answer_a: str,
    answer_b: str,
    tokens: AnswerTokens,
) -> list[int]:
    """Ids after which the next token is A or B: the rendered prompt and what both labels begin with ("Answer").

    Raises RenderError like `Renderer.prompt_ids`.
    """
    labels = zip(rubric.pairwise.answer_a_label, rubric.pairwise.answer_b_label, strict=False)
    lead_in = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], labels)).rstrip()
    prompt = renderer.prompt_ids(pairwise_prompt(rubric, messages, answer_a, answer_b))
    return prompt + lead_in_ids(renderer.tokenizer, lead_in, tokens)


def choice_tokens(tokenizer: Any) -> AnswerTokens:
    """A and B -> their token ids. Raises UserError when one is several tokens."""
    return answer_tokens(tokenizer, ["A", "B"])


def probability_of_a(logprobs: Mapping[int, float], tokens: AnswerTokens) -> tuple[float | None, float]:
    """(p(A) / (p(A) + p(B)), mass on A and B); the first is None, and the mass 0, when there is none or it is not a number."""
    masses = answer_masses(logprobs, tokens)
    mass = sum(masses.values())
    if math.isnan(mass):
        return None, 0.0
    return (masses["A"] / mass if mass > 0 else None), min(mass, 1.0)
