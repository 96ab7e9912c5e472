"""Prompts stage: read, clean, identify, deduplicate, split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.config.sources import PromptFields, PromptSource
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Account, Context, Drop, Rows, Stopped, TableStage, tally
from stages.empty import without_languages
from stages.prompts.duplicates import Deduplicator
from stages.sources import Batch, columns_of, excerpt, read_rows
from stages.text.assign import UNSEEN, Label, RunLanguages, Splitter, Spoken, group_of
from stages.text.codes import UNKNOWN
from stages.text.messages import BadRow, Messages, read_prompt, spoken, too_long

_SCHEMA = TABLES["prompts"].schema
_RAW = 4
"""Characters of a cell to one that is left of it, at most: spaces and control characters go, accents are composed."""
_FIX = (
    "Add prompts in this language, relax the rule that dropped them, or take it out of languages.seen; if the sources are not "
    "what you think, look at their `fields` and `language`."
)


@dataclass
class _Row:
    """A row on its way through the rules."""

    row_id: str
    number: int
    cells: dict[str, Any]
    label: Label | None = None
    language: str | None = None
    messages: Messages = field(default_factory=list)
    confidence: float = 0.0


class Prompts(TableStage):
    """TableStage: sources -> prompts. Units: rows of the sources, in their order.

    Drop reasons: empty, not_text, tool_calls, unknown_role, no_user_turn; invalid_language, language_not_in_run,
    no_language, low_confidence, wrong_language; too_short, too_long (far over prompts.max_chars before anything else is looked
    at); duplicate, near_duplicate;
    translation_of_training (a row of an unseen language whose translation group is trained on in another language:
    answering it would show what was trained on). Rows of unseen languages come last.
    Raises UserError for unusable sources or a split that is none; the account refuses to go on without training prompts
    in a seen language (pairs.on_empty_language) or in any.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Yield the prompts table in batches, then the account."""
        return _Run(ctx).run()


class _Run:
    def __init__(self, ctx: Context) -> None:
        self.ctx, self.config = ctx, ctx.config.prompts
        run_languages = ctx.config.languages
        self.languages = RunLanguages(run_languages)
        self.splitter = Splitter(
            ctx.config.seed,
            run_languages.unseen,
            self.config.dev_fraction,
            self.config.test_fraction,
            remember=any(source.fields.split or source.splits for source in self.config.sources),
        )
        threshold = self.config.near_duplicate_threshold
        self.deduplicators = {code: Deduplicator(threshold) for code in self.languages.codes}
        self.rows_in: Counter[str] = Counter()
        self.kept: Counter[tuple[str, str]] = Counter()
        self.trained_groups: set[str] = set()
        self.unseen: list[pa.Table] = []
        self.drops: list[Drop] = []

    def run(self) -> Iterator[Rows | Account]:
        readers = [(source, self._open(source)) for source in self.config.sources]
        for note in self.languages.notes:
            self.ctx.progress.note(note)
        yield Rows("prompts", _SCHEMA.empty_table())
        self.ctx.progress.total(0, "rows")
        for source, batches in readers:
            for batch in batches:
                if self.ctx.stop():
                    raise Stopped
                for note in batch.notes:
                    self.ctx.progress.note(f"{batch.source}: {note}")
                table = pa.Table.from_pylist(self._batch(batch, source), schema=_SCHEMA)
                is_unseen = pc.equal(table["split"], UNSEEN)
                self.unseen.append(table.filter(is_unseen))
                if len(seen := table.filter(pc.invert(is_unseen))):
                    yield Rows("prompts", seen)
                self.ctx.progress.advance(len(batch.rows))
        for table in self.unseen:
            if len(clean := self._without_translations(table)):
                yield Rows("prompts", clean)
        tallies = tally("row", self.rows_in.elements(), self.drops)
        if self.splitter.moved:
            self.ctx.progress.note(
                f"{self.splitter.moved} rows took the split of their translation group instead of their own"
            )
        if overruled := self.languages.overruled:
            self.ctx.progress.note(
                f"{overruled:,} rows keep their label although the language identifier does not confirm it"
            )
        empty = [code for code in self.ctx.config.languages.seen if not self.kept[code, "train"]]
        kept: Counter[str] = Counter()
        for (code, _), count in self.kept.items():
            kept[code] += count
        refusal = without_languages(self.ctx, "prompts", empty, self.drops, kept=kept, fix=_FIX)
        stats = {"labels_overruled": float(overruled), "languages_without_prompts": float(len(empty))}
        yield Account(tallies, self.drops, stats, refusal=refusal)

    def _open(self, source: PromptSource) -> Iterator[Batch]:
        required, optional = columns_of(source.fields, ("language", "group_id"))
        return read_rows(source, self.languages.codes, required, optional)

    def _batch(self, batch: Batch, source: PromptSource) -> list[dict[str, Any]]:
        rows = [_Row(f"{batch.source}:{batch.start + i}", batch.start + i, cells) for i, cells in enumerate(batch.rows)]
        rows = [row for row in rows if self._parse(row, source.fields, batch.language)]
        texts = [spoken(row.messages) for row in rows]
        guesses = self.languages.guess(texts)
        rows = [
            row for row, text, said in zip(rows, texts, guesses, strict=True) if self._settle(row, Spoken(text, said))
        ]
        return [self._finish(row, source, batch) for row in self._without_duplicates(rows)]

    def _parse(self, row: _Row, fields: PromptFields, source_language: str | None) -> bool:
        try:
            row.label = self.languages.label(
                row.cells.get(fields.language) if fields.language else None, source_language
            )
            row.language = row.label[0] if row.label else None
            prompt, most = row.cells.get(fields.prompt), self.config.max_chars
            if beyond := too_long(prompt, _RAW * most):
                raise BadRow("too_long", f"{beyond} characters")
            row.messages = read_prompt(prompt, row.cells.get(fields.system) if fields.system else None)
            characters = len(spoken(row.messages))
            if characters < self.config.min_chars:
                raise BadRow("too_short", f"{characters} characters")
            if characters > most:
                raise BadRow("too_long", f"{characters} characters")
        except BadRow as bad:
            return self._drop(row, bad)
        return True

    def _settle(self, row: _Row, text: Spoken) -> bool:
        row.confidence = text.guess.confidence
        try:
            row.language = self.languages.settle(row.label, [text])
        except BadRow as bad:
            return self._drop(row, bad)
        return True

    def _without_duplicates(self, rows: list[_Row]) -> list[_Row]:
        stay: list[_Row] = []
        for language, deduplicator in self.deduplicators.items():
            mine = [row for row in rows if row.language == language]
            texts = [spoken(row.messages) for row in mine]
            full = ["\n".join(message["content"] for message in row.messages) for row in mine]
            for row, verdict in zip(mine, deduplicator.check([r.row_id for r in mine], texts, full), strict=True):
                if verdict is None:
                    stay.append(row)
                else:
                    self._drop(row, BadRow(verdict[0], f"of {verdict[1]}"))
        return sorted(stay, key=lambda row: row.number)

    def _finish(self, row: _Row, source: PromptSource, batch: Batch) -> dict[str, Any]:
        language, messages, fields = str(row.language), row.messages, source.fields
        prompt_id = content_id(language, messages)
        group_id = group_of(row.cells.get(fields.group_id) if fields.group_id else None, prompt_id)
        own = row.cells.get(fields.split) if fields.split else None
        split = self.splitter.split(language, group_id, own or batch.split, row.row_id, source.splits)
        self.rows_in[language] += 1
        self.kept[language, split] += 1
        if split == "train":
            self.trained_groups.add(group_id)
        return {
            "prompt_id": prompt_id,
            "group_id": group_id,
            "language": language,
            "split": split,
            "messages": messages,
            "language_confidence": row.confidence,
            "source": batch.source,
            "source_row": row.number,
        }

    def _without_translations(self, table: pa.Table) -> pa.Table:
        """Rows of unseen languages whose group is not trained on; the others are dropped."""
        trained = pc.is_in(table["group_id"], value_set=pa.array(self.trained_groups, pa.string()))
        for row in table.filter(trained).select(["source", "source_row", "language", "group_id"]).to_pylist():
            row_id, language = f"{row['source']}:{row['source_row']}", row["language"]
            self.kept[language, UNSEEN] -= 1
            self.drops.append(Drop("row", row_id, language, "translation_of_training", f"group {row['group_id']}"))
        return table.filter(pc.invert(trained))

    def _drop(self, row: _Row, bad: BadRow) -> bool:
        language = row.language or UNKNOWN
        self.rows_in[language] += 1
        self.drops.append(Drop("row", row.row_id, language, bad.reason, bad.detail, text=excerpt(row.cells)))
        return False
