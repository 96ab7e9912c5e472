"""The last step of every pair, whatever it came from: rendered, measured, given its id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.ids import content_id
from stages.contract import Context, Drop
from stages.text.messages import BadRow, Messages, same_text
from stages.text.render import Renderer, RenderError, check_thoughts, load_renderer

_EXCERPT = 200  # characters
_SHOWN = 3  # marks


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
    criterion: str = ""
    label_error: str | None = None


class Finisher:
    """Makes rows of the pairs table: thoughts as text.thoughts says, control marks neutralised, system prompt added or
    folded, length checked.

    system_prompt: what the answers were generated under, None for imported pairs. Raises UserError where thoughts are to be
    kept and the template leaves them out.
    """

    def __init__(self, ctx: Context, system_prompt: str | None) -> None:
        self._round, self._system = ctx.round, system_prompt
        self._longest = ctx.config.text.max_length
        self._policy = ctx.config.text.thoughts
        self.renderer: Renderer = load_renderer(
            ctx.models["policy"], ctx.config.text, ctx.config.model.trust_remote_code
        )
        check_thoughts(self.renderer, self._policy)
        self._counts: Counter[str] = Counter()
        self._marks: dict[str, Counter[str]] = {"answers": Counter(), "prompts": Counter()}
        self._pair_ids: set[bytes] = set()
        for note in (*self.renderer.notes, *self.renderer.notes_on_learning):
            ctx.progress.note(note)

    @property
    def stats(self) -> dict[str, float]:
        """Control marks that were broken, in prompts and in answers, and thoughts left out of answers."""
        names = ("neutralised_marks", "neutralised_marks_in_answers", "thoughts_left_out")
        return {name: float(self._counts[name]) for name in names}

    def notes(self) -> Iterator[str]:
        """What was done to answers and prompts, for people."""
        if left_out := self._counts["thoughts_left_out"]:
            yield f"{left_out:,} answers are learnt without the thought before them (text.thoughts: strip)"
        if broken := self._counts["neutralised_marks_in_answers"]:
            yield f"{broken:,} control marks of the model inside answers got a space{self._shown('answers')} (neutralised_marks_in_answers)"
        if broken := self._counts["neutralised_marks"] - broken:
            yield f"{broken:,} control marks of the model inside prompts got a space{self._shown('prompts')} (neutralised_marks, those of answers apart)"

    def _shown(self, where: str) -> str:
        found = [mark for mark, _ in self._marks[where].most_common(_SHOWN)]
        return f", for example {', '.join(found)}," if found else ""

    def _count(self, where: str, text: str, broken: int) -> None:
        """So many control marks of a text were broken: keep which they are."""
        self._counts["neutralised_marks"] += broken
        if broken:
            self._marks[where].update(self.renderer.neutralise.marks_in(text))

    def finish(self, drafts: Sequence[Draft]) -> tuple[list[dict[str, Any]], list[Drop]]:
        """(rows of the pairs table, drops).

        Drop reasons: too_long, thought, broken_thought, tool_calls (of rows), empty, identical (once thoughts are gone, or as tokens) and duplicate (once thoughts and marks are gone); failed: cannot_render.
        """
        rows: list[dict[str, Any]] = []
        drops: list[Drop] = []
        for draft in drafts:
            result: dict[str, Any] | Drop
            try:
                result = self._row(draft)
            except BadRow as bad:
                text = draft.chosen[:_EXCERPT] if draft.unit == "row" else ""
                result = Drop(draft.unit, draft.row_id, draft.language, bad.reason, bad.detail, text=text)
            except RenderError as error:
                result = Drop(draft.unit, draft.row_id, draft.language, "cannot_render", str(error), failed=True)
            if isinstance(result, Drop):
                drops.append(result)
            else:
                rows.append(result)
        return rows, drops

    def _row(self, draft: Draft) -> dict[str, Any]:
        targets = self._targets(draft.chosen, draft.rejected)
        if draft.unit == "row" and any(map(self.renderer.calls_tools, targets)):
            raise BadRow("tool_calls", "written as text, in the model's own marks")
        if same_text(targets[0], targets[1]):
            raise BadRow("identical", "without thoughts")
        prompt = self.renderer.prepare(draft.prompt, self._system)
        chosen, rejected = self._answer(targets[0]), self._answer(targets[1])
        ids = self.renderer.pair_ids(prompt, chosen, rejected)
        if ids.chosen == ids.rejected:
            raise BadRow("identical", "the same tokens")
        tokens = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
        if tokens > self._longest:
            raise BadRow("too_long", f"{tokens} tokens > text.max_length {self._longest}")
        for message in draft.prompt:
            self._count("prompts", message["content"], self.renderer.neutralise(message["content"])[1])
        pair_id = content_id(draft.prompt_id, chosen, rejected, *filter(None, [draft.criterion]))
        if (key := bytes.fromhex(pair_id)) in self._pair_ids:
            raise BadRow("duplicate", "the same pair, once thoughts and marks are gone")
        self._pair_ids.add(key)
        return {
            "pair_id": pair_id,
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
            "criterion": draft.criterion or None,
            "label_error": draft.label_error,
        }

    def _targets(self, chosen: str, rejected: str) -> tuple[str, str]:
        targets = self.renderer.thoughts.targets(chosen, rejected, self._policy)
        self._counts["thoughts_left_out"] += (len(targets[0]) < len(chosen)) + (len(targets[1]) < len(rejected))
        return targets

    def _answer(self, text: str) -> Messages:
        harmless, broken = self.renderer.neutral_answer(text)
        self._counts["neutralised_marks_in_answers"] += broken
        self._count("answers", text, broken)
        return [{"role": "assistant", "content": harmless}]
