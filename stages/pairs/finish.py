"""The last step of every pair, whatever it came from: rendered, measured, given its id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from schemas.ids import content_id
from stages.contract import Context, Drop
from stages.text.messages import Messages
from stages.text.render import RenderError, load_renderer


@dataclass(frozen=True)
class Draft:
    """A pair before it is rendered. unit, row_id: what it is accounted as if it has to go."""

    unit: str
    row_id: str
    language: str
    split: str
    group_id: str
    prompt_id: str
    prompt: Messages
    chosen: str
    rejected: str
    source: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_candidate_id: str | None = None
    rejected_candidate_id: str | None = None


class Finisher:
    """Makes rows of the pairs table: control marks neutralised, system prompt added or folded, length checked.

    system_prompt: what the answers were generated under, None for imported pairs.
    """

    def __init__(self, ctx: Context, system_prompt: str | None) -> None:
        self._round, self._system = ctx.round, system_prompt
        self._longest = ctx.config.text.max_length
        self._renderer = load_renderer(ctx.models["policy"], ctx.config.text, ctx.config.model.trust_remote_code)
        self.marks = 0
        for note in self._renderer.notes:
            ctx.progress.note(note)

    def finish(self, drafts: Sequence[Draft]) -> tuple[list[dict[str, Any]], list[Drop]]:
        """(rows of the pairs table, drops). Drop reasons: too_long; failed: cannot_render."""
        rows: list[dict[str, Any]] = []
        drops: list[Drop] = []
        for draft in drafts:
            try:
                result = self._row(draft)
            except RenderError as error:
                result = Drop(draft.unit, draft.row_id, draft.language, "cannot_render", str(error), failed=True)
            if isinstance(result, Drop):
                drops.append(result)
            else:
                rows.append(result)
        return rows, drops

    def _row(self, draft: Draft) -> dict[str, Any] | Drop:
        prompt = self._renderer.prepare(draft.prompt, self._system)
        self.marks += sum(self._renderer.neutralise(message["content"])[1] for message in draft.prompt)
        chosen, rejected = self._answer(draft.chosen), self._answer(draft.rejected)
        ids = self._renderer.pair_ids(prompt, chosen, rejected)
        tokens = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
        if tokens > self._longest:
            detail = f"{tokens} tokens > text.max_length {self._longest}"
            return Drop(draft.unit, draft.row_id, draft.language, "too_long", detail)
        return {
            "pair_id": content_id(draft.prompt_id, chosen, rejected),
            "round": self._round,
            "prompt_id": draft.prompt_id,
            "group_id": draft.group_id,
            "language": draft.language,
            "split": draft.split,
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": draft.chosen_score,
            "rejected_score": draft.rejected_score,
            "chosen_candidate_id": draft.chosen_candidate_id,
            "rejected_candidate_id": draft.rejected_candidate_id,
            "source": draft.source,
        }

    def _answer(self, text: str) -> Messages:
        harmless, broken = self._renderer.neutralise(text)
        self.marks += broken
        return [{"role": "assistant", "content": harmless}]
