"""The judge methods: every fact about one, readable before anything heavy is there. `stages.judge.methods` has their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from schemas.engines import Task

JudgeMethod = Literal["expected_score", "additive", "reward_model", "implicit_reward", "pairwise"]


@dataclass(frozen=True)
class MethodFacts:
    """All that is true of a judge method; nothing elsewhere asks for its name.

    task: what it asks of an engine. scale: its scores in words. bounds: least and largest score; None: there are none.
    rubric: shows the judge a rubric file. reference: needs a second model, `judge.reference`. own_model: the policy cannot be
    the judge.
    """

    task: Task
    scale: str
    bounds: tuple[float, float] | None = None
    rubric: bool = False
    reference: bool = False
    own_model: bool = False


METHODS: Mapping[JudgeMethod, MethodFacts] = {
    "expected_score": MethodFacts("text", "0 to 5", (0.0, 5.0), rubric=True),
    "additive": MethodFacts("text", "0 to 5", (0.0, 5.0), rubric=True),
    "reward_model": MethodFacts("reward", "the reward model's own", own_model=True),
    "implicit_reward": MethodFacts("loglik", "nats times beta", reference=True),
    "pairwise": MethodFacts("text", "log odds within a prompt", rubric=True),
}
