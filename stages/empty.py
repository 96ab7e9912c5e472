"""Languages that a table ends without: the run stops, or goes on without them, and says why they are empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from schemas.errors import UserError
from schemas.reasons import explained
from stages.contract import Context, Drop
from stages.text.codes import UNKNOWN

_REASONS = 3


def without_languages(
    ctx: Context, table: str, empty: Sequence[str], drops: Sequence[Drop], *, held_out: bool, fix: str
) -> UserError | None:
    """The refusal to go on without training rows in the languages `empty`; None (and a note a language) if that is allowed.

    table: prompts or pairs. held_out: whether rows are left that are not trained on. fix: what to do in this kind of run.
    Without any language nothing is left to do, whatever the config says.
    """
    row = table.removesuffix("s")
    seen = ctx.config.languages.seen
    fix = f"{fix} The dropped rows: `python -m pipeline inspect {ctx.config.folder} dropped/{table}`."
    key = "pairs.on_empty_language"
    if empty and len(empty) == len(seen):
        kept = "" if not held_out else " (those that are left are held out: see the fractions and `splits`)"
        return UserError(f"there is no training {row} in any language{kept}: {why_dropped(drops)}", where=table, fix=fix)
    mine = {language: [drop for drop in drops if drop.language == language] for language in empty}
    unknown = [drop for drop in drops if drop.language == UNKNOWN]
    if empty and ctx.config.pairs.on_empty_language == "fail":
        said = "; ".join(f"{language}: {why_dropped(mine[language] or unknown)}" for language in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        return UserError(
            f"there is no training {row} in {', '.join(empty[:5])}{more} ({said})",
            where=f"{table}, {key}: fail",
            fix=f"{fix} `{key}: skip` goes on without such languages.",
        )
    for language in empty:
        why = why_dropped(mine[language] or unknown)
        ctx.progress.note(f"no training {row} in {language} ({why}): the run goes on without this language")
    return None


def why_dropped(drops: Sequence[Drop]) -> str:
    """The most frequent reasons, each with its count, its meaning and one example."""
    if not drops:
        return "no row came in"
    counts = Counter((drop.unit, drop.reason) for drop in drops)
    said = []
    for (unit, reason), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:_REASONS]:
        example = next(drop for drop in drops if (drop.unit, drop.reason) == (unit, reason))
        meaning = explained(reason).partition(". Change:")[0]
        detail = f": {example.detail}" if example.detail else ""
        said.append(f"{unit} {reason} {count:,} ({meaning}; for example {example.row_id}{detail})")
    rest = len(counts) - len(said)
    return ", ".join(said) + (f", and {rest} more reasons" if rest > 0 else "")
