"""Languages that a table ends without: the run stops, or goes on without them, and says why they are empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from schemas.errors import UserError
from schemas.languages import UNKNOWN
from stages.contract import Context, Drop

_REASONS = 3


def without_languages(
    ctx: Context,
    table: str,
    empty: Sequence[str],
    drops: Sequence[Drop],
    *,
    kept: Mapping[str, int],
    fix: str,
    why_held: Callable[[Sequence[str]], str] | None = None,
) -> UserError | None:
    """The refusal to go on without training rows in the languages `empty`; None (and a note a language) if that is allowed.

    table: prompts or pairs. kept: language -> rows that are left: in the languages `empty` they are held out. fix: what to do in this kind of run.
    why_held: languages -> why rows of theirs are held out, if that is known. Without any language nothing is left to do, whatever the config says.
    """
    row = table.removesuffix("s")
    seen = ctx.config.languages.seen
    fix = f"{fix} The dropped rows: `python -m pipeline inspect {ctx.config.folder} dropped/{table}`."
    key = "pairs.on_empty_language"
    if empty and len(empty) == len(seen):
        why = why_dropped(drops, sum(kept.values()), why_held(ctx.config.languages.codes) if why_held else "")
        return UserError(f"there is no training {row} in any language: {why}", where=table, fix=fix)
    unknown = [drop for drop in drops if drop.language == UNKNOWN]
    why_empty = {}
    for language in empty:
        mine = [drop for drop in drops if drop.language == language]
        why_empty[language] = why_dropped(mine, kept.get(language, 0), why_held([language]) if why_held else "")
        if not mine and unknown:
            why_empty[language] += f"; of unknown language: {why_dropped(unknown, 0)}"
    if empty and ctx.config.pairs.on_empty_language == "fail":
        said = "; ".join(f"{language}: {why_empty[language]}" for language in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        return UserError(
            f"there is no training {row} in {', '.join(empty[:5])}{more} ({said})",
            where=f"{table}, {key}: fail",
            fix=f"{fix} `{key}: skip` goes on without such languages.",
        )
    for language in empty:
        ctx.progress.note(
            f"no training {row} in {language} ({why_empty[language]}): the run goes on without this language"
        )
    return None


def why_dropped(drops: Sequence[Drop], held_out: int, why: str = "") -> str:
    """The most frequent reasons, each with its count and one example, and how many rows are held out, and why."""
    because = f" ({why})" if why else ""
    if not drops:
        return f"every row is held out, {held_out:,}{because}" if held_out else "no row came in"
    counts = Counter((drop.unit, drop.reason) for drop in drops)
    said = []
    for (unit, reason), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:_REASONS]:
        example = next(drop for drop in drops if (drop.unit, drop.reason) == (unit, reason))
        detail = f", {example.detail[:120]}" if example.detail else ""
        text = f": {example.text[:60]!r}" if example.text else ""
        said.append(f"{unit} {reason} {count:,} (for example {example.row_id}{detail}{text})")
    rest = len(counts) - len(said)
    if rest > 0:
        said.append(f"{rest} more reasons")
    return ", ".join(said) + (f"; held out: {held_out:,}{because}" if held_out else "")
