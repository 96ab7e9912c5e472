"""The columns of a preference data set, looked at before a row is read: what is missing, or means something else, is an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any

from schemas.config.sources import PairFields
from schemas.errors import UserError
from stages.beside import SIDES, has_answers
from stages.cells import Unreadable
from stages.layout import HALF, missing_column
from stages.sources import Batch
from stages.text.messages import BadRow, clean, kind_of

_LONG_ENOUGH = 20
"""Characters of a prompt that answers do not begin with by chance; fewer in scripts that say more with each."""
_DENSE_ENOUGH = 5
BY_CHANCE = 3
"""Fewer prompts that answers begin with prove nothing, where there are more pairs."""
_DENSE = re.compile(
    "[\u0e00-\u0e7f\u1100-\u11ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Chinese characters, kana, Hangul, Thai."""
_RANKS = frozenset((
    "rank", "ranks", "ranking", "rankings", "place", "position", "order", "loss", "perplexity", "ppl", "cost", "costs", "penalty",
    "penalties", "error", "errors", "mistakes", "distance", "logloss", "mse", "brier", "violation", "violations", "regret", "worst",
    "badness", "issues", "downvotes", "dislikes", "dispreference", "uncertainty", "entropy", "variance",
    "platz", "rang", "classement", "puesto",
))  # fmt: skip
_RATINGS = frozenset(("score", "scores", "rating", "ratings", "reward", "rewards", "win", "wins", "vote", "votes"))
_HARMS = frozenset((
    "severity", "toxicity", "toxic", "harm", "harmful", "harmfulness", "unsafe", "risk", "hallucination", "hallucinations", "bias",
    "nll", "wer", "cer", "ter", "mqm",
))  # fmt: skip
"""Less is better of a score of one, too."""
_NOT = frozenset((
    "not", "no", "non", "anti", "free", "less", "low", "neg", "negative", "negated", "minus", "inverse", "inverted", "reduction", "avoidance",
    "effectiveness", "efficiency",
))  # fmt: skip
"""Words that turn it round: `neg_rank`, `not_toxic`, `error_free`."""
_LIKELIHOODS = frozenset(("likelihood", "likelihoods", "log", "logp", "logps", "logprob", "logprobs"))
_MARKS = frozenset(frozenset((cased(one), cased(other))) for one, other in SIDES for cased in (str.lower, str.upper))
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def check_sides(batch: Batch, fields: PairFields) -> None:
    """Raise UserError for a data set with chosen and rejected whose prompt is missing, or is repeated in the answers, or whose
    scores are ranks."""
    for field in ("chosen_score", "rejected_score"):
        _refuse_rank(field, getattr(fields, field))
    if fields.prompt not in batch.columns and _needs_prompt(batch.rows, fields):
        error = missing_column(batch.source, fields.prompt, batch.columns)
        example = next((cell for row in batch.rows if isinstance(cell := row.get(fields.chosen), str)), None)
        shown = "" if example is None else f", for example {example.strip()[:60]!r}"
        raise UserError(
            f"{error.what}, and {fields.chosen!r} and {fields.rejected!r} are no conversations in a form that is known{shown}",
            where=error.where,
            fix=f"{error.fix} The forms are in docs/data.md.",
        )
    _refuse_names(batch, fields)
    repeated, told, pairs = [], 0, 0
    for row in batch.rows:
        prompt = _last(row.get(fields.prompt), "user") or ""
        sides = [_last(_only(row.get(side)), "assistant") for side in (fields.chosen, fields.rejected)]
        answers = [text for text in sides if text is not None]
        pairs += len(answers) == 2
        if len(answers) < 2 or not tells(prompt):
            continue
        told += 1
        if all(len(answer) > len(prompt) and answer.startswith(prompt) for answer in answers):
            repeated.append(prompt)
    if repeated and len(repeated) >= max(HALF * told, min(BY_CHANCE, pairs)):
        raise UserError(
            f"{fields.chosen!r} and {fields.rejected!r} repeat the prompt, for example {repeated[0][:60]!r}",
            where=batch.source,
            fix="Cut the prompt off the answers: they would be learnt with it.",
        )


def _refuse_names(batch: Batch, fields: PairFields) -> None:
    """Raise UserError where chosen and rejected name answers that are elsewhere in the row: other columns, or places in a list."""
    elsewhere = set(batch.columns) - {fields.prompt, fields.chosen, fields.rejected}
    marks = _MARKS if has_answers(sorted(elsewhere)) else frozenset()
    sides = [(str(row.get(fields.chosen)).strip(), str(row.get(fields.rejected)).strip()) for row in batch.rows]
    naming = [side for side in sides if side[0] != side[1] and (elsewhere.issuperset(side) or frozenset(side) in marks)]
    if naming and len(naming) >= HALF * len(sides):
        one, other = naming[0]
        raise UserError(
            f"{fields.chosen!r} and {fields.rejected!r} hold names of answers ({one[:40]!r}, {other[:40]!r}), not what they say",
            where=batch.source,
            fix="Write the texts that they name into them: docs/own-pairs.md has the lines, with a winner.",
        )


def tells(prompt: str) -> bool:
    """Whether a prompt is so long that answers do not begin with it by chance."""
    return len(prompt) >= (_DENSE_ENOUGH if _DENSE.search(prompt) else _LONG_ENOUGH)


def check_completions(batch: Batch, fields: PairFields) -> None:
    """Raise UserError for a data set of completions without prompts, or whose completions have no text or score."""
    if fields.prompt not in batch.columns:
        raise missing_column(batch.source, fields.prompt, batch.columns)
    _refuse_rank("completion_score", fields.completion_score)
    answers = list(chain.from_iterable(_answers(row.get(fields.completions or "")) for row in batch.rows))
    keyed = [answer for answer in answers if isinstance(answer, dict)]
    if answers and not keyed and fields.completion_score not in batch.columns:
        raise missing_column(batch.source, fields.completion_score, batch.columns)
    for field in ("completion_text", "completion_score"):
        key = getattr(fields, field)
        keys = Counter(name for answer in keyed for name in answer)
        if keyed and key not in keys:
            names = [str(name) for name, _ in keys.most_common(40)]
            nearest = get_close_matches(key, names, n=1, cutoff=0.55)
            raise UserError(
                f"no answer in {fields.completions!r} has the key {key!r}; the keys are {', '.join(map(repr, names))[:800]}",
                where=batch.source,
                fix=(f"Did you mean {nearest[0]!r}? " if nearest else "") + f"Set the source's fields.{field}.",
            )


def _refuse_rank(field: str, column: str | None) -> None:
    """Raise UserError for a column of which less is better, by the words of its name: `rank`, `avgPPL`, `toxicity_score`, but not
    `rank_score`."""
    column = column or ""
    named = [word.lower() for word in _WORDS.findall(column)]
    words = set(named)
    turned = bool(words & _NOT) or column.startswith("-")
    rank = words & _RANKS and (not words & _RATINGS or named[-1] in ("rank", "ranks", "ranking", "rankings"))
    harm = (words & _HARMS and not words & {"reward", "rewards"}) or any(word.endswith("toxicity") for word in words)
    unlikely = ("neg" in words and words & _LIKELIHOODS) or {"negative", "likelihood"} <= words
    if unlikely or ((rank or harm) and not turned):
        raise UserError(
            f"by its name, {column!r} is a rank or a loss, a cost or a harm, of which less is better",
            where=f"fields.{field}",
            fix="Name a score of which more is better: write one into the data, for example the rank with a minus as `neg_rank`.",
        )


def completions_of(cells: Mapping[str, Any], fields: PairFields) -> list[tuple[Any, Any, Any]]:
    """(answer, score, who wrote it) of every completion in the row. Raises BadRow: empty, not_text."""
    value = cells.get(fields.completions or "")
    if isinstance(value, Unreadable):
        raise BadRow(value.reason, value.detail)
    answers = _answers(value)
    if not value:
        raise BadRow("empty", "no completions")
    if not answers:
        raise BadRow("not_text", f"{fields.completions}: {kind_of(value)} instead of a list of answers")
    if all(isinstance(answer, dict) for answer in answers):
        names = (fields.completion_text, fields.completion_score, fields.completion_model or "")
        return [(answer.get(names[0]), answer.get(names[1]), answer.get(names[2])) for answer in answers]
    scores = cells.get(fields.completion_score)
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise BadRow(
            "not_text", f"{len(answers)} answers, and {fields.completion_score!r} is no list of as many scores"
        )
    return [(answer, score, None) for answer, score in zip(answers, scores, strict=True)]


def _answers(value: Any) -> list[Any]:
    """The completions in a cell: a list, or a dict of lists side by side."""
    beside = isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values())
    if beside and len({len(column) for column in value.values()}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else []


def _last(value: Any, role: str) -> str | None:
    """The text of a cell, or of its last message if that is `role`'s."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == role:
        value = value[-1].get("content")
    return clean(value).strip() if isinstance(value, str) else None


def _only(value: Any) -> Any:
    """A text, or a list of one message; None for anything else."""
    return value if isinstance(value, str) or (isinstance(value, list) and len(value) == 1) else None


def _needs_prompt(rows: Sequence[Mapping[str, Any]], fields: PairFields) -> bool:
    """Whether no row does without a prompt: in not one is chosen or rejected a whole conversation, or cannot be read."""
    return not any(_is_whole(row.get(side)) for row in rows for side in (fields.chosen, fields.rejected))


def _is_whole(value: Any) -> bool:
    if isinstance(value, Unreadable):
        return True
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") != "assistant"
    )
