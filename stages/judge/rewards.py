"""Judges without a rubric: a reward model's score, or what DPO taught a model (its implicit reward)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from schemas.config.judging import Judge
from schemas.errors import UserError
from stages.contract import Context, Drop
from stages.engines import Wanted
from stages.engines.base import Completion, Request
from stages.judge.method import Candidate, Pointwise, Verdict, Vote
from stages.text.codes import same_language

ENGLISH = "en"


class RewardModel(Pointwise):
    """A sequence classifier's logit for the conversation, rendered by the classifier's own chat template."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._head = _head(self.judge, self.engine.labels)

    @classmethod
    def wanted(cls, ctx: Context, judge: Judge) -> list[Wanted]:
        """See `Method.wanted`. text.chat_template is the policy's, not the reward model's."""
        (one,) = super().wanted(ctx, judge)
        assert one.text is not None
        text = one.text.model_copy(update={"chat_template": judge.settings.chat_template})
        return [Wanted(one.role, one.task, one.engine, text)]

    def ask(self, index: int, candidate: Candidate) -> list[Request] | Drop:
        """See `Pointwise.ask`."""
        answer = {"role": "assistant", "content": self.said(candidate)}
        ids = self.renderer.whole_ids([*candidate.messages, answer])
        return [self.request(index, candidate.id, 0, ids, whole=True)]

    def verdict(self, candidate: Candidate, completions: Sequence[Completion]) -> Verdict:
        """See `Pointwise.verdict`."""
        return [Vote(completions[0].values[self._head])]


class ImplicitReward(Pointwise):
    """beta (log pi(y|x) - log pi_ref(y|x)), pi trained by DPO from pi_ref (arXiv 2305.18290, equation 5, without its constant).

    cross_lingual: x is the English prompt of the same translation group (arXiv 2503.04647).
    Raises UserError when pi and pi_ref have different vocabularies, or no prompt has an English translation.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        own, other = (engine.renderer.tokenizer.get_vocab() for engine in self.engines)
        if own != other:
            raise UserError(
                "The judge and its reference have different vocabularies: their log-probabilities are of other tokens",
                where=f"{self.judge.where}.reference",
                fix="Give the model that the judge was trained from.",
            )
        self._english = self._english_prompts() if self.settings.cross_lingual else {}

    @classmethod
    def wanted(cls, ctx: Context, judge: Judge) -> list[Wanted]:
        """See `Method.wanted`."""
        (own,) = super().wanted(ctx, judge)
        return [own, Wanted(judge.reference_role, own.task, own.engine, own.text)]

    def ask(self, index: int, candidate: Candidate) -> list[Request] | Drop:
        """See `Pointwise.ask`. Drop reason no_english_prompt."""
        messages = candidate.messages
        if self.settings.cross_lingual and not same_language(candidate.language, ENGLISH):
            if candidate.prompt_id not in self._english:
                return candidate.dropped("no_english_prompt", "its translation group has no prompt in English")
            messages = self._english[candidate.prompt_id]
        answer = [{"role": "assistant", "content": self.said(candidate)}]
        ids = self.renderer.pair_ids(messages, answer, answer)
        return [
            self.request(index, candidate.id, number, ids.prompt, target_ids=tuple(ids.chosen), of=number)
            for number in range(len(self.engines))
        ]

    def verdict(self, candidate: Candidate, completions: Sequence[Completion]) -> Verdict:
        """See `Pointwise.verdict`."""
        own, reference = (completion.values[0] for completion in completions)
        return [Vote(self.settings.beta * (own - reference))]

    def _english_prompts(self) -> dict[str, list[dict[str, str]]]:
        """prompt id -> messages of the English prompt of its translation group."""
        table = self.ctx.scan("prompts").select("prompt_id", "group_id", "language", "messages").collect()
        english = table.filter(
            pl.Series([same_language(code, ENGLISH) for code in table["language"]], dtype=pl.Boolean)
        )
        first = {row["group_id"]: row["messages"] for row in reversed(english.to_dicts())}
        others = [row for row in table.to_dicts() if not same_language(row["language"], ENGLISH)]
        found = {row["prompt_id"]: first[row["group_id"]] for row in others if row["group_id"] in first}
        if others and not found:
            raise UserError(
                "No prompt has a translation into English: no two prompts share a translation group",
                where=f"{self.judge.where}.cross_lingual",
                fix="Give prompts.sources a group (fields.group_id), or leave cross_lingual out.",
            )
        return found


def _head(judge: Judge, labels: Sequence[str]) -> int:
    """Which head of the classifier is the score. Raises UserError."""
    wanted = judge.settings.head
    names = ", ".join(f"{number}: {label}" for number, label in enumerate(labels))
    if wanted is None:
        if len(labels) == 1:
            return 0
        raise UserError(
            f"The reward model has {len(labels)} heads, and which of them is the score is not said",
            where=f"{judge.where}.head",
            fix=f"Set it to one of {names}; criteria can use one each.",
        )
    if isinstance(wanted, str) and wanted in labels:
        return list(labels).index(wanted)
    if isinstance(wanted, int) and 0 <= wanted < len(labels):
        return wanted
    raise UserError(f"The reward model has no head {wanted}", where=f"{judge.where}.head", fix=f"It has {names}.")
