"""Finished answers of a baseline (`evaluate.baseline.answers`), matched to the prompts that are evaluated by the prompt's text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.config.evaluation import AnswerSource
from schemas.errors import UserError
from schemas.languages import UNKNOWN
from stages.cells import word
from stages.contract import Context, Drop
from stages.evaluate.heldout import HeldOutPrompt
from stages.evaluate.leak import prompt_text
from stages.source_kinds import batches_of
from stages.sources import excerpt
from stages.text.assign import RunLanguages, Spoken
from stages.text.language import Guess
from stages.text.messages import BadRow, read_messages, read_prompt
from stages.text.render import Renderer

_WHERE = "evaluate.baseline.answers"


@dataclass(frozen=True)
class _Taken:
    """A row that answers prompts. text: how it begins."""

    row_id: str
    language: str
    prompts: list[str]
    text: str


class BaselineAnswers:
    """Reads them, of all prompts that may be evaluated. languages: of every row read; answered: row ids of the prompts that have an answer.

    Raises UserError where a prompt has two answers, or no prompt has any.
    """

    def __init__(
        self, ctx: Context, prompts: Sequence[HeldOutPrompt], languages: RunLanguages, renderer: Renderer
    ) -> None:
        self._languages, self._renderer = languages, renderer
        self._prompts: dict[str, list[HeldOutPrompt]] = defaultdict(list)
        for prompt in prompts:
            self._prompts[prompt_text(prompt.prompt)].append(prompt)
        self._found: dict[str, tuple[str, str, str]] = {}
        self._taken: list[_Taken] = []
        self._drops: list[Drop] = []
        self.languages: Counter[str] = Counter()
        for source in ctx.config.evaluate.baseline.answers:
            self._read(source)
        if prompts and not self._found:
            raise UserError(
                "None of the baseline's answers is to a prompt that is evaluated",
                where=_WHERE,
                fix="They are matched by the prompt's text: give the set they answer as evaluate.prompts, and check `fields` and `generator`.",
            )
        if len(self._found) < len(prompts):
            ctx.progress.note(
                f"the baseline has an answer to {len(self._found):,} of {len(prompts):,} prompts: they are drawn before the others"
            )

    @property
    def answered(self) -> Container[str]:
        """Row ids of prompts."""
        return self._found.keys()

    def table(self, prompts: Sequence[HeldOutPrompt]) -> pa.Table:
        """row_id, text, finish_reason, as `answers.answer` gives them: one row for each of `prompts` that has an answer."""
        asked = [prompt.row_id for prompt in prompts if prompt.row_id in self._found]
        rows = [{"row_id": name, "text": self._found[name][0], "finish_reason": "stop"} for name in asked]
        schema = pa.schema([("row_id", pa.string()), ("text", pa.string()), ("finish_reason", pa.string())])
        return pa.Table.from_pylist(rows, schema=schema)

    def drops(self, prompts: Sequence[HeldOutPrompt]) -> list[Drop]:
        """Unit row: not_asked (answers to none of `prompts`, or another generator's), or why a row cannot be read."""
        asked = {prompt.row_id for prompt in prompts}
        why = "its prompt was not drawn (evaluate.prompts_per_language)"
        return self._drops + [
            Drop("row", one.row_id, one.language, "not_asked", why, text=one.text)
            for one in self._taken
            if asked.isdisjoint(one.prompts)
        ]

    def _read(self, source: AnswerSource) -> None:
        for batch in batches_of(source, self._languages.codes):
            for number, cells in enumerate(batch.rows, start=batch.start):
                row_id, language = f"{batch.source}:{number}", UNKNOWN
                try:
                    language = self._take(source, row_id, batch.language, cells)
                except BadRow as bad:
                    self._drops.append(Drop("row", row_id, language, bad.reason, bad.detail, text=excerpt(cells)))
                self.languages[language] += 1

    def _take(self, source: AnswerSource, row_id: str, language: str | None, cells: dict[str, Any]) -> str:
        """Keep a row's answer; the language of its prompt. Raises BadRow."""
        fields = source.fields
        by = word(cells.get(fields.generator)) or ""
        if source.generator is not None and by != source.generator:
            raise BadRow("not_asked", f"generator {by}")
        prompt = read_prompt(cells.get(fields.prompt))
        given = cells.get(fields.language) if fields.language else None
        label = self._languages.label(given, language)
        matching = self._prompts.get(prompt_text(prompt), [])
        if label is not None:
            code = self._languages.settle(label, [Spoken(prompt_text(prompt), Guess(UNKNOWN, 0.0, 0.0))])
            matching = [one for one in matching if one.language == code]
        if not matching:
            raise BadRow("not_asked", "no prompt that is evaluated has this text")
        said = read_messages(cells.get(fields.answer), "assistant")[-1]["content"]
        text = self._renderer.neutralise(self._renderer.thoughts.said(said))[0]
        self._taken.append(_Taken(row_id, matching[0].language, [one.row_id for one in matching], excerpt(cells)))
        for one in matching:
            there = self._found.setdefault(one.row_id, (text, by, row_id))
            if there[0] != text:
                names = f"generators {there[1]} and {by}" if there[1] != by else f"rows {there[2]} and {row_id}"
                raise UserError(
                    f"The baseline has two answers to one prompt ({names})",
                    where=f"{_WHERE}: {source.path}",
                    fix="Name one of them: evaluate.baseline.answers[].generator; or leave one answer a prompt in the data.",
                )
        return matching[0].language
