"""Prompts stage: read, clean, identify, deduplicate, split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Account, Context, Drop, Rows, Stopped, TableStage, tally
from stages.empty import without_languages
from stages.prompts.duplicates import Deduplicator
from stages.prompts.reading import PromptRow, Read, Reader, read_all
from stages.sources import EXCERPT, names_splits, prompt_batches
from stages.text.assign import UNSEEN, Splitter, assumed_said, group_of
from stages.text.messages import spoken

_SCHEMA = TABLES["prompts"].schema
_FIX = (
    "Add prompts in this language, relax the rule that dropped them, or take it out of languages.seen; if the sources are not "
    "what you think, look at their `fields` and `language`."
)

_FIX_ANSWERED = (
    "These are whole conversations, and a prompt ends in a user turn: write each without its last answer into a file, or learn from them "
    "(`sft.sources`)."
)


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
        self.reader = Reader(ctx.config)
        self.splitter = Splitter(
            ctx.config.seed,
            run_languages.unseen,
            self.config.dev_fraction,
            self.config.test_fraction,
            remember=any(map(names_splits, self.config.sources)),
            where="prompts",
        )
        threshold = self.config.near_duplicate_threshold
        self.deduplicators = {code: Deduplicator(threshold) for code in self.reader.languages.codes}
        self.rows_in: Counter[str] = Counter()
        self.kept: Counter[tuple[str, str]] = Counter()
        self.trained_groups: set[str] = set()
        self.unseen: list[pa.Table] = []
        self.drops: list[Drop] = []
        self.overruled = self.assumed = 0

    def run(self) -> Iterator[Rows | Account]:
        readers = [prompt_batches(source, self.reader.languages.codes) for source in self.config.sources]
        for note in self.reader.languages.notes:
            self.ctx.progress.note(note)
        yield Rows("prompts", _SCHEMA.empty_table())
        self.ctx.progress.total(0, "rows")
        batches = ((number, batch) for number, reader in enumerate(readers) for batch in reader)
        with closing(read_all(self.reader, self.ctx.config, batches)) as read:
            for done in read:
                if self.ctx.stop():
                    raise Stopped
                for note in done.notes:
                    self.ctx.progress.note(f"{done.batch_source}: {note}")
                table = pa.Table.from_pylist(self._rows(done), schema=_SCHEMA)
                is_unseen = pc.equal(table["split"], UNSEEN)
                self.unseen.append(table.filter(is_unseen))
                if len(seen := table.filter(pc.invert(is_unseen))):
                    yield Rows("prompts", seen)
                self.ctx.progress.advance(done.count)
        for table in self.unseen:
            if len(clean := self._without_translations(table)):
                yield Rows("prompts", clean)
        tallies = tally("row", self.rows_in.elements(), self.drops)
        for note in self.splitter.notes():
            self.ctx.progress.note(note)
        if overruled := self.overruled:
            self.ctx.progress.note(
                f"{overruled:,} rows keep their label although the language identifier does not confirm it"
            )
        if self.assumed:
            self.ctx.progress.note(assumed_said(self.assumed, self.reader.languages.codes[0]))
        empty = [code for code in self.ctx.config.languages.seen if not self.kept[code, "train"]]
        kept: Counter[str] = Counter()
        for (code, _), count in self.kept.items():
            kept[code] += count
        answered = sum(drop.reason == "no_user_turn" for drop in self.drops)
        fix = _FIX_ANSWERED if 2 * answered > len(self.drops) else _FIX
        why_held = self.splitter.held_out
        refusal = without_languages(self.ctx, "prompts", empty, self.drops, kept=kept, fix=fix, why_held=why_held)
        stats = {"labels_overruled": float(overruled), "languages_without_prompts": float(len(empty))}
        yield Account(tallies, self.drops, stats, refusal=refusal)

    def _rows(self, read: Read) -> list[dict[str, Any]]:
        """Rows of the prompts table, less duplicates."""
        self.overruled += read.overruled
        self.assumed += read.assumed
        self.drops += read.drops
        self.rows_in.update(drop.language for drop in read.drops)
        return [self._row(row, read) for row in read.rows if self._is_new(row)]

    def _is_new(self, row: PromptRow) -> bool:
        assert row.key is not None, "every row that was read has one"
        self.rows_in[row.language] += 1
        verdict = self.deduplicators[row.language].check(row.row_id, row.key)
        if verdict is not None:
            detail, text = f"of {verdict[1]}", spoken(row.messages)[:EXCERPT]
            self.drops.append(Drop("row", row.row_id, row.language, verdict[0], detail, text=text))
        return verdict is None

    def _row(self, row: PromptRow, read: Read) -> dict[str, Any]:
        language = row.language
        prompt_id = content_id(language, row.messages)
        group_id = group_of(row.group, prompt_id)
        source = self.config.sources[read.source]
        names = source.splits if row.split else None
        split = self.splitter.split(language, group_id, row.split or read.split, row.row_id, names, source.path)
        self.kept[language, split] += 1
        if split == "train":
            self.trained_groups.add(group_id)
        return {
            "prompt_id": prompt_id,
            "group_id": group_id,
            "language": language,
            "split": split,
            "messages": row.messages,
            "language_confidence": row.confidence,
            "source": read.batch_source,
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
