"""Pairs stage: from the round's judged candidates, or from an existing preference data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import Account, Context, Drop, Rows, TableStage, tally
from stages.pairs.finish import Finisher
from stages.pairs.from_candidates import FromCandidates
from stages.pairs.imported import Imported

_SCHEMA = TABLES["pairs"].schema


class Pairs(TableStage):
    """TableStage: candidates, judgements, prompts -> pairs; or pairs.sources -> pairs.

    From candidates, units candidate (truncated, empty, wrong_language, unjudged) and prompt (too_few_candidates,
    identical, tie, too_long; failed: prompt_missing, cannot_render). Imported, unit row (see stages.pairs.imported;
    too_long; failed: cannot_render). Raises UserError for unusable sources or judgements, and, with on_empty_language:
    fail, for a seen language without a training pair.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Yield the pairs table in batches, then the account."""
        system_prompt = None if ctx.config.imported else ctx.config.generate.sampling.system_prompt
        finisher = Finisher(ctx, system_prompt)
        origin: Imported | FromCandidates = Imported(ctx) if ctx.config.imported else FromCandidates(ctx)
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
        drops = origin.drops + drops
        tallies = [entry for unit, languages in origin.units().items() for entry in tally(unit, languages, drops)]
        empty = [language for language in ctx.config.languages.seen if not train[language]]
        _check_languages(ctx, empty, drops)
        yield Account(tallies, drops, {"neutralised_marks": finisher.marks, "languages_without_pairs": len(empty)})


def _check_languages(ctx: Context, empty: list[str], drops: list[Drop]) -> None:
    fix = (
        "More or longer answers help (generate.candidates, max_tokens), and a smaller pairs.min_margin; "
        "`_dropped/pairs` lists the reasons."
    )
    if len(empty) == len(ctx.config.languages.seen):
        raise UserError(f"there is no training pair in any language: {_reasons(drops)}", where="pairs", fix=fix)
    for language in empty:
        why = _reasons([drop for drop in drops if drop.language == language])
        if ctx.config.pairs.on_empty_language == "fail":
            raise UserError(
                f"there is no training pair in {language}: {why}", where="pairs.on_empty_language: fail", fix=fix
            )
        ctx.progress.note(f"no training pair in {language} ({why}): the run goes on without this language")


def _reasons(drops: list[Drop]) -> str:
    counts = Counter(f"{drop.unit} {drop.reason}" for drop in drops)
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "nothing came in"
