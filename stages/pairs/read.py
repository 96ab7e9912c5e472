"""A row of a preference data set, in any of its layouts, as pairs: prompt, chosen, rejected and their scores."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

from schemas.config.sources import PairSource
from stages.cells import Rating, Unsure, ratings
from stages.pairs.columns import check_completions, check_sides, completions_of, tells
from stages.sources import Batch, columns_of, read_rows
from stages.text.messages import (
    BadRow,
    Messages,
    comparable,
    read_messages,
    read_prompt,
    same_text,
    too_long,
    with_system,
)


@dataclass(frozen=True)
class RawPair:
    """A pair as the data has it, cleaned; prompt ends in a user turn. unread: scores that are written and could not be read.
    writers: the models that wrote chosen and rejected, empty where the data does not say. untold: a `prompt` that says more than the conversations,
    which are what is taken."""

    prompt: Messages
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    unread: int = 0
    writers: tuple[str, str] = ("", "")
    untold: str = ""


_UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Thai, Lao, Tibetan, Burmese, Khmer, kana and Han, which put no spaces between words."""
Names = tuple[str, str, str]
"""What the data calls prompt, chosen and rejected."""


def read_pair(
    prompt: Any, chosen: Any, rejected: Any, system: Any = None, names: Names = ("prompt", "chosen", "rejected")
) -> RawPair:
    """Clean prompt and answers from texts or message lists.

    When chosen and rejected are whole conversations the messages they share are the prompt, as in TRL's `extract_prompt`; where one is, and the
    other an answer alone, it answers the same;
    a prompt that ends in them, or in the first of them, is taken whole. Raises BadRow: as read_prompt, and no_prompt, prompt_differs (it and what is shared
    have nothing in common), several_answers (more than one assistant message, or another role, after the shared part), empty
    (nothing after it), identical (the answers are the same text, what nobody sees left out).
    """
    sides = [
        _read(name, side, lambda side: read_messages(side, role="assistant"))
        for name, side in zip(names[1:], (chosen, rejected), strict=True)
    ]
    untold = ""
    for whole, other in ((0, 1), (1, 0)):
        if len(sides[whole]) > 1 and sides[whole][-1]["role"] == "assistant" and _is_answer(sides[other]):
            sides[other] = [*sides[whole][:-1], *sides[other]]
    if all(side[0]["role"] != "assistant" for side in sides):
        both = zip(*sides, strict=False)
        shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
        if not shared:
            raise BadRow("no_prompt", "the two conversations share no message")
        if all(len(side) == len(shared) for side in sides):
            raise BadRow("identical")
        (prompt, untold), sides = _asked(prompt, shared), [side[len(shared) :] for side in sides]
    elif prompt is None:
        raise BadRow("no_prompt", "the answers are no whole conversations either")
    messages = with_system(_read(names[0], prompt, read_prompt), system)
    for name, side in zip(names[1:], sides, strict=True):
        if not side:
            raise BadRow("empty", f"{name}: no answer after the prompt")
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise BadRow("several_answers", f"{len(side)} messages after the prompt, roles {[m['role'] for m in side]}")
    answers = [side[0]["content"] for side in sides]
    if same_text(answers[0], answers[1]):
        raise BadRow("identical", "" if answers[0] == answers[1] else "but for characters that nobody sees")
    return RawPair(messages, answers[0], answers[1], untold=untold)


def _is_answer(side: Messages) -> bool:
    return len(side) == 1 and side[0]["role"] == "assistant"


def _read(name: str, value: Any, read: Callable[[Any], Messages]) -> Messages:
    """What a cell says. Raises BadRow as `read` does, naming the column where it holds something else than text."""
    try:
        return read(value)
    except BadRow as bad:
        if bad.reason in ("not_text", "unknown_role"):
            raise BadRow(bad.reason, f"{name}: {bad.detail}") from None
        raise


def _asked(prompt: Any, shared: Messages) -> tuple[Messages, str]:
    """What was asked: what the conversations share, after what `prompt` says before it; and a `prompt` that says more around their last question.
    Raises BadRow: prompt_differs."""
    try:
        own = read_messages(prompt)
    except BadRow:
        return shared, ""
    turns = [message for message in own if message["role"] != "system"]
    unanswered = own[:-1] if own[-1]["role"] == "assistant" else own
    if (joined := _joined(own, shared) or _joined(unanswered, shared)) is not None:
        return joined, ""
    begun = [(message["role"], comparable(message["content"])) for message in shared]
    last = next((text for role, text in reversed(begun) if role == "user"), begun[-1][1])
    untold = ""
    if len(turns) == 1:
        said = comparable(turns[0]["content"])
        known = any(
            _stands_in(said, text) or (tells(said) and text.startswith(said)) for _, text in begun
        )  # or a preview, cut off
        if not known and _stands_in(last, said):
            known, untold = True, turns[0]["content"]
    else:
        known = all((message["role"], comparable(message["content"])) in begun for message in turns)
    if known:
        return with_system(shared, own[0]["content"] if own[0]["role"] == "system" else None), untold
    raise BadRow(
        "prompt_differs", f"prompt {own[-1]['content'][:60]!r}, the conversations {shared[-1]['content'][:60]!r}"
    )


def _stands_in(said: str, text: str) -> bool:
    """Whether a text stands in another and cuts no word of it; scripts that put no spaces between words have none to cut."""
    at = text.find(said)
    while at >= 0:
        end = at + len(said)
        if not (_is_in_word(text[max(0, at - 1) : at + 1]) or _is_in_word(text[end - 1 : end + 1])):
            return True
        at = text.find(said, at + 1)
    return False


def _is_in_word(two: str) -> bool:
    """Whether there are two characters, and both are of one word."""
    return len(two) == 2 and all(unicodedata.category(sign)[0] in "LMN" and not _UNSPACED.match(sign) for sign in two)


def _joined(own: Messages, shared: Messages) -> Messages | None:
    """`own` and what `shared` says beyond it, if the one ends in the messages that the other begins with; else None."""
    said, begun = (
        [(message["role"], comparable(message["content"])) for message in messages] for messages in (own, shared)
    )
    for count in range(min(len(said), len(begun)), 0, -1):
        if said[-count:] == begun[:count]:
            return [*own, *shared[count:]]
    return None


_OPTIONAL = ("prompt", "language", "group_id")


def pair_batches(source: PairSource, codes: Sequence[str], most: int | None = None) -> Iterator[Batch]:
    """Batches of a preference data set. Raises UserError, before a row is given, for a column that is missing: `prompt` too,
    unless chosen and rejected are whole conversations. most: as of `read_rows`."""
    fields = source.fields
    required, optional = columns_of(fields, _OPTIONAL)
    if fields.completions is None:
        lists, singles = {fields.rejected: fields.chosen}, (fields.prompt, fields.chosen, fields.rejected)
        return read_rows(
            source, codes, required, optional, lambda b: check_sides(b, fields), None, lists, singles, most
        )
    optional.append(fields.completion_score)
    structured, asked = {fields.completions: fields.completion_text, fields.completion_score: None}, (fields.prompt,)
    return read_rows(
        source, codes, required, optional, lambda b: check_completions(b, fields), structured, singles=asked, most=most
    )


def pairs_of(cells: Mapping[str, Any], source: PairSource, longest: int) -> Iterator[RawPair | BadRow]:
    """The pairs of a row, at least one; what cannot be one is the BadRow that says why.

    longest: characters from which prompt or answer is too_long, before anything looks at them.
    """
    fields = source.fields
    prompt, system = (_cell(cells, name) for name in (fields.prompt, fields.system))
    answered = f"{fields.completions}.{fields.completion_text}" if fields.completions else ""
    names = (fields.prompt, answered or fields.chosen, answered or fields.rejected)
    try:
        sides = (_of_completions if fields.completions else _of_sides)(cells, source, longest)
    except BadRow as bad:
        yield bad
        return
    for side in sides:
        try:
            if beyond := max(too_long(cell, longest) for cell in (prompt, side.chosen, side.rejected)):
                raise BadRow("too_long", f"{beyond:,} characters > {longest:,}")
            pair = read_pair(prompt, side.chosen, side.rejected, system, names)
            values = _comparable(side.scores)
            said = (_writer(side.writers[0]), _writer(side.writers[1]))
            yield replace(pair, chosen_score=values[0], rejected_score=values[1], unread=side.unread, writers=said)
        except BadRow as bad:
            yield bad


class Sides(NamedTuple):
    """Cells of a pair: its answers, what they are rated, who wrote them. unread: scores that are written and cannot be read."""

    chosen: Any
    rejected: Any
    scores: tuple[Rating | None, Rating | None]
    writers: tuple[Any, Any]
    unread: int


def _of_sides(cells: Mapping[str, Any], source: PairSource, longest: int) -> list[Sides]:
    """Chosen against rejected; of several rejected against each, or the first that says something else than chosen."""
    fields = source.fields
    chosen, rejected = cells.get(fields.chosen), cells.get(fields.rejected)
    given = [_cell(cells, name) for name in (fields.chosen_score, fields.rejected_score)]
    by = [_cell(cells, name) for name in (fields.chosen_model, fields.rejected_model)]
    if isinstance(chosen, list) and is_several(chosen):
        if len(chosen) > 1:
            raise BadRow("several_answers", f"chosen is a list of {len(chosen)} answers")
        chosen = chosen[0]
        given[0] = given[0][0] if isinstance(given[0], list) and len(given[0]) == 1 else given[0]
    if not isinstance(rejected, list) or not is_several(rejected):
        return [_sides(chosen, rejected, given, by)]
    scores, writers = (_for_each(cell, len(rejected)) for cell in (given[1], by[1]))
    sides = [
        _sides(chosen, answer, (given[0], score), (by[0], writer))
        for answer, score, writer in zip(rejected, scores, writers, strict=True)
        if answer is not None
    ]
    if not sides:
        raise BadRow("empty", "no rejected answer")
    if source.many == "all":
        return sides
    return [next((side for side in sides if not _same(chosen, side.rejected, longest)), sides[0])]


def _sides(chosen: Any, rejected: Any, scores: Sequence[Any], writers: Sequence[Any]) -> Sides:
    (one, other), unread = _rated(scores)
    return Sides(chosen, rejected, (_sure(one), _sure(other)), (writers[0], writers[1]), unread)


def _rated(scores: Sequence[Any]) -> tuple[list[Rating | Unsure | None], int]:
    """The ratings of scores that are compared, and how many are written and cannot be read."""
    found = ratings(scores)
    return found, sum(score is not None and _sure(rating) is None for score, rating in zip(scores, found, strict=True))


def _sure(rating: Rating | Unsure | None) -> Rating | None:
    return rating if isinstance(rating, Rating) else None


def _for_each(cell: Any, count: int) -> list[Any]:
    """What a cell says of each of several answers: one thing for all, or a list; nothing where it has another length."""
    if not isinstance(cell, list):
        return [cell] * count
    return cell if len(cell) == count else [None] * count


def _writer(cell: Any) -> str:
    """A model's name; empty where the cell holds none."""
    return cell.strip() if isinstance(cell, str) else ""


def is_several(value: Any) -> bool:
    """Whether a cell holds several answers: a list of texts or of conversations, not one conversation."""
    return isinstance(value, list) and bool(value) and not any(isinstance(answer, dict) for answer in value)


def _of_completions(cells: Mapping[str, Any], source: PairSource, longest: int) -> list[Sides]:
    """Best against worst of scored answers, or best against all that are worse; ties in favour of the first. Answers that say the same
    as the best are passed over, if there are others."""
    answers = [entry for entry in completions_of(cells, source.fields) if entry[0] is not None]
    found, unread = _rated([score for _, score, _ in answers])
    scored = [
        (answer, rating, writer)
        for (answer, _, writer), rating in zip(answers, found, strict=True)
        if isinstance(rating, Rating)
    ]
    unsure = next((rating.number for rating in found if isinstance(rating, Unsure)), None)
    if unsure and scored:
        one, other = unsure.replace(",", "."), unsure.replace(",", "")
        raise BadRow("too_few_candidates", f"the score {unsure!r} may be {one} or {other}")
    if len(scored) < 2:
        beside = f", {unread} scores that cannot be read" if unread else ""
        raise BadRow("too_few_candidates", f"{len(scored)} answers with a score{beside}")
    if len({rating.out_of for _, rating, _ in scored}) > 1:
        raise BadRow("too_few_candidates", "the scores are out of different numbers (7/10 and 80%)")
    best = max(scored, key=lambda entry: entry[1].value)
    worse = [entry for entry in scored if entry[1].value < best[1].value]
    if not worse:
        raise BadRow("tie", f"all {len(scored)} answers are rated {best[1].value:g}")
    worse = [entry for entry in worse if not _same(best[0], entry[0], longest)] or worse
    if source.many == "one":
        worse = [min(worse, key=lambda entry: entry[1].value)]
    return [
        Sides(best[0], entry[0], (best[1], entry[1]), (best[2], entry[2]), 0 if place else unread)
        for place, entry in enumerate(worse)
    ]


def _same(one: Any, other: Any, longest: int) -> bool:
    """Whether two answers are the same text; False where one cannot be read, or is longer than `longest` characters."""
    if too_long([one, other], longest):
        return False
    try:
        said = [read_messages(answer, role="assistant") for answer in (one, other)]
    except BadRow:
        return False
    return len(said[0]) == len(said[1]) and all(
        same_text(mine["content"], yours["content"]) for mine, yours in zip(*said, strict=True)
    )


def _comparable(scores: tuple[Rating | None, Rating | None]) -> tuple[float | None, float | None]:
    """The two scores; none where they are out of different numbers (7/10 and 4/5)."""
    chosen, rejected = scores
    if chosen and rejected and chosen.out_of != rejected.out_of:
        return None, None
    return chosen.value if chosen else None, rejected.value if rejected else None


def _cell(cells: Mapping[str, Any], column: str | None) -> Any:
    return cells.get(column) if column else None
