"""Pairs stage: from the round's judged candidates, or from an existing preference data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from schemas.tables import TABLES
from stages.contract import Account, Context, Drop, Rows, TableStage, tally
from stages.empty import without_languages
from stages.pairs.finish import Finisher
from stages.pairs.from_candidates import FromCandidates
from stages.pairs.imported import Imported
from stages.text.refusals import without_phrases

_SCHEMA = TABLES["pairs"].schema
_FIX = (
    "More or longer answers help (generate.candidates, generate.sampling.max_tokens), and a smaller pairs.min_margin."
)
_FIX_TIES = (
    "pairs.min_margin ({margin:g}) is a difference in the units of your own scores: make it smaller, 0 keeps every pair that is "
    "not rated below; or leave chosen_score and rejected_score out of the source's `fields`."
)
_FIX_IMPORTED = "Look at pairs.sources (`fields`, `language`) and at what those reasons say."


class Pairs(TableStage):
    """TableStage: candidates, judgements, prompts -> pairs; or pairs.sources -> pairs.

    From candidates, units candidate (truncated, empty, repetitive, refusal, thought, broken_thought, wrong_language, unjudged) and prompt
    (too_few_candidates, identical, tie, too_long; failed: prompt_missing, cannot_render). Imported, unit row (see
    stages.pairs.imported and stages.pairs.finish). Raises UserError for unusable sources or judgements; the account refuses
    to go on without any training pair and, with on_empty_language: fail, without one in a seen language.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Yield the pairs table in batches, then the account."""
        imported = ctx.config.imported
        finisher = Finisher(ctx, None if imported else ctx.config.generate.sampling.system_prompt)
        renderer = finisher.renderer
        origin: Imported | FromCandidates = (
            Imported(ctx, renderer.thoughts, renderer.longest_text)
            if imported
            else FromCandidates(ctx, renderer.thoughts)
        )
        for note in _without_refusals(ctx):
            ctx.progress.note(note)
        train: Counter[str] = Counter()
        drops: list[Drop] = []
        yield Rows("pairs", _SCHEMA.empty_table())
        ctx.progress.total(origin.amount, "pairs" if origin.amount else "rows")
        for drafts in origin.drafts():
            rows, unfinished = finisher.finish(drafts)
            drops += unfinished
            train.update(row["language"] for row in rows if row["split"] == "train")
            if rows:
                yield Rows("pairs", pa.Table.from_pylist(rows, schema=_SCHEMA))
            ctx.progress.advance(len(drafts))
        for note in finisher.notes():
            ctx.progress.note(note)
        drops = origin.drops + drops
        tallies = [entry for unit, languages in origin.units().items() for entry in tally(unit, languages, drops)]
        empty = [language for language in ctx.config.languages.seen if not train[language]]
        kept = Counter({entry.language: entry.kept for entry in tallies if entry.unit in ("row", "prompt")})
        fix = _FIX_IMPORTED if imported else _FIX
        if imported and _mostly_ties(drops):
            fix = _FIX_TIES.format(margin=ctx.config.pairs.min_margin)
        why_held = origin.held_out if isinstance(origin, Imported) else None
        refusal = without_languages(ctx, "pairs", empty, drops, kept=kept, fix=fix, why_held=why_held)
        stats = {"languages_without_pairs": float(len(empty)), **finisher.stats, **origin.stats}
        yield Account(tallies, drops, stats, refusal=refusal)


def _mostly_ties(drops: Sequence[Drop]) -> bool:
    """Whether no reason is as common as scores that differ too little."""
    return bool(drops) and Counter(drop.reason for drop in drops).most_common(1)[0][0] == "tie"


def _without_refusals(ctx: Context) -> Iterator[str]:
    """Says in which languages of the run refusals are looked for and not known."""
    config = ctx.config
    unlisted = without_phrases(config.languages.codes)
    if config.pairs.drop_refusals and unlisted:
        yield f"pairs.drop_refusals: no phrases are listed for {', '.join(unlisted)}: only refusals in English are found there"
