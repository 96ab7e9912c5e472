"""Judges that read a rubric and score an answer from 0 to 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stages.contract import Drop
from stages.engines.base import Completion, Request
from stages.judge.additive import parse_vote
from stages.judge.answer_tokens import all_ids
from stages.judge.expected_score import expected_score, score_ids, score_prompt, score_tokens
from stages.judge.method import Candidate, Pointwise, Verdict, Vote
from stages.judge.rubric import Rubrics


class ExpectedScore(Pointwise):
    """One forward pass: the mean of the scores under their probabilities (docs/methods.md section 1)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tokens = score_tokens(self.renderer.tokenizer)
        self._rubrics = Rubrics(self.settings.rubric, self.ctx.progress.note)

    def ask(self, index: int, candidate: Candidate) -> list[Request] | Drop:
        """See `Pointwise.ask`."""
        texts = self._rubrics.of(candidate.language).expected_score
        system = self.settings.sampling.system_prompt
        ids = score_ids(self.renderer, texts, candidate.messages, self.said(candidate), self._tokens, system)
        return [self.request(index, candidate.id, 0, ids, score_tokens=all_ids(self._tokens))]

    def verdict(self, candidate: Candidate, completions: Sequence[Completion]) -> Verdict:
        """See `Pointwise.verdict`. Drop reasons low_mass; failed: engine_error."""
        score, mass = expected_score(completions[0].score_logprobs, self._tokens)
        if not math.isfinite(mass):
            return candidate.dropped("engine_error", "the judge's probabilities are not finite (NaN)", failed=True)
        if score is None or mass < self.settings.min_mass:
            detail = f"probability {mass:.3g} on the score tokens < {self.settings.min_mass}"
            return candidate.dropped("low_mass", detail)
        return [Vote(score, mass)]


class Additive(Pointwise):
    """The judge reasons, then scores: judge.votes times (docs/methods.md section 1)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rubrics = Rubrics(self.settings.rubric, self.ctx.progress.note)

    def ask(self, index: int, candidate: Candidate) -> list[Request] | Drop:
        """See `Pointwise.ask`."""
        messages = score_prompt(self._rubrics.of(candidate.language).additive, candidate.messages, self.said(candidate))
        ids = self.renderer.prompt_ids(messages, self.settings.sampling.system_prompt)
        return [self.request(index, candidate.id, vote, ids) for vote in range(self.settings.votes)]

    def verdict(self, candidate: Candidate, completions: Sequence[Completion]) -> Verdict:
        """See `Pointwise.verdict`. Unparseable votes beside others are votes without a score. Drop reason unparseable."""
        scores = [parse_vote(completion.text, completion.finish_reason) for completion in completions]
        if all(score is None for score in scores):
            return candidate.dropped("unparseable", f"none of {len(scores)} votes ends in `Score: k`")
        return [Vote(score) for score in scores]
