"""Preference pairs with truth by construction, from the authored templates of data/planted.

A question is one filled template; its numbers, names and times are drawn once for all languages, so that translations
share a group. Three contrasts over the same questions:

    subtle     chosen: the true answer; rejected: the same sentence with one number, name, date or negation wrong
    easy       chosen: the true answer; rejected: a true answer to a question of another kind
    language   chosen: the true answer; rejected: the same true answer in another language

No answer text is both chosen in one group and rejected in another, so that groups can be left out one by one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from stages.data import data_path

CONTRASTS = ("subtle", "easy", "language")
ERROR = {
    "sum": "number",
    "product": "number",
    "road": "number",
    "year": "date",
    "train": "date",
    "lives": "name",
    "capital": "name",
    "symbol": "name",
    "greater": "negation",
    "even": "negation",
}
"""Kind of question -> what is wrong in the rejected answer of the subtle contrast."""
_TRIES = 1000


@dataclass(frozen=True)
class Question:
    """One question for all languages. slots fill the templates; `true` and `false` are the answer's {x}, a row of the
    language's table (negative: no such row) or, for negations, whether the answer is yes."""

    kind: str
    slots: dict[str, str]
    true: str
    false: str

    @property
    def keys(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What makes the true and the false answer's text unique."""
        inside = {"lives": ("e",), "road": (), "year": (), "train": (), "capital": ()}.get(self.kind, ("a", "b"))
        fixed = tuple(self.slots.get(name, "") for name in inside)
        return (self.kind, self.true, *fixed), (self.kind, self.false, *fixed)


class Language:
    """The templates of one language. Raises FileNotFoundError for a language that has none."""

    def __init__(self, code: str) -> None:
        self.code = code
        self._texts: dict[str, Any] = yaml.safe_load(data_path(f"planted/{code}.yaml").read_text(encoding="utf-8"))

    def question(self, question: Question) -> str:
        """The question's text."""
        return str(self._texts[question.kind]["question"]).format(**self._words(question))

    def answer(self, question: Question, right: bool) -> str:
        """The true or the false answer's text."""
        value = question.true if right else question.false
        template = self._texts[question.kind][value if ERROR[question.kind] == "negation" else "answer"]
        return str(template).format(**self._words(question), x=self._word(question.kind, value))

    def _words(self, question: Question) -> dict[str, str]:
        words = dict(question.slots)
        if question.kind == "lives":
            words |= {slot: self._texts["names"][int(words[slot])] for slot in ("a", "b")}
            words |= {slot: self._texts["cities"][int(words[slot])] for slot in ("c", "d", "e")}
        if question.kind in ("capital", "symbol"):
            words["a"] = self._table(question.kind)[int(words["a"])][0]
        return words

    def _word(self, kind: str, value: str) -> str:
        if kind == "lives":
            return str(self._texts["names"][int(value)])
        if kind in ("capital", "symbol"):
            row, column = value.split(":")
            return str(self._table(kind)[int(row)][int(column)])
        return value

    def _table(self, kind: str) -> list[list[str]]:
        table: list[list[str]] = self._texts["capitals" if kind == "capital" else "symbols"]
        return table


def languages() -> list[str]:
    """Codes of the languages with templates."""
    return sorted(
        path.name.removesuffix(".yaml") for path in data_path("planted").iterdir() if path.name.endswith(".yaml")
    )


def draw(count: int, seed: int, used: set[tuple[str, ...]] | None = None, tables: bool = True) -> list[Question]:
    """`count` questions, the kinds in turn; kinds with a table (capitals, symbols) until it is used up.

    Adds the answers' keys to `used` and avoids those in it. Raises ValueError when no new question can be found.
    """
    rng, used = random.Random(seed), set() if used is None else used
    kinds = [kind for kind in ERROR if tables or kind not in ("capital", "symbol")]
    found: list[Question] = []
    misses = 0
    while len(found) < count:
        kind = kinds[(len(found) + misses) % len(kinds)]
        for _ in range(_TRIES):
            question = _DRAW[kind](rng)
            if not used.intersection(question.keys):
                used.update(question.keys)
                found.append(question)
                break
        else:
            misses += 1
            if misses > _TRIES:
                raise ValueError(f"only {len(found)} different questions can be made, not {count}")
    return found


def make_pairs(codes: Sequence[str], count: int, contrast: str, seed: int = 0) -> list[dict[str, str]]:
    """`count` pairs in each language: group_id, kind, error, language, prompt, chosen, rejected."""
    if contrast not in CONTRASTS:
        raise ValueError(f"unknown contrast {contrast!r}; known: {', '.join(CONTRASTS)}")
    if contrast == "language" and len(codes) < 2:
        raise ValueError("the contrast between languages needs two of them")
    used: set[tuple[str, ...]] = set()
    questions = draw(count, seed, used)
    off_topic = _off_topic(questions, draw(2 * count + 2, seed + 1, used, tables=False), random.Random(seed + 2))
    spoken = [Language(code) for code in codes]
    rows = []
    for number, question in enumerate(questions):
        for place, language in enumerate(spoken):
            wrong = language.answer(question, right=False)
            if contrast == "easy":
                wrong = language.answer(off_topic[number], right=True)
            if contrast == "language":
                other = spoken[(place + 1 + number % (len(spoken) - 1)) % len(spoken)]
                wrong = other.answer(question, right=True)
            rows.append(
                {
                    "group_id": f"{number:04d}-{question.kind}",
                    "kind": question.kind,
                    "error": ERROR[question.kind] if contrast == "subtle" else contrast,
                    "language": language.code,
                    "prompt": language.question(question),
                    "chosen": language.answer(question, right=True),
                    "rejected": wrong,
                }
            )
    return rows


def _off_topic(questions: Sequence[Question], pool: Sequence[Question], rng: random.Random) -> list[Question]:
    """For every question one of the pool, of another kind; each used once. The pool is twice as large: there is one."""
    left = rng.sample(pool, len(pool))
    return [left.pop(next(n for n, other in enumerate(left) if other.kind != question.kind)) for question in questions]


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(12, 89), rng.randint(12, 89)
    return Question(
        "sum", {"a": str(a), "b": str(b)}, str(a + b), str(a + b + rng.choice([-11, -10, -2, -1, 1, 2, 10]))
    )


def _product(rng: random.Random) -> Question:
    a, b = rng.randint(3, 12), rng.randint(3, 19)
    return Question("product", {"a": str(a), "b": str(b)}, str(a * b), str(a * b + rng.choice([-a, -2, -1, 1, 2, a])))


def _road(rng: random.Random) -> Question:
    a, b = rng.randint(21, 89), rng.randint(11, 95)
    return Question("road", {"a": str(a), "b": str(b)}, str(a + b), str(a + b + rng.choice([-10, -3, -2, 2, 3, 10])))


def _year(rng: random.Random) -> Question:
    a, b = rng.randint(1860, 1989), rng.randint(11, 19)  # 11 to 19: one plural form in every language
    return Question("year", {"a": str(a), "b": str(b)}, str(a + b), str(a + b + rng.choice([-10, -5, -2, 2, 5, 10])))


def _train(rng: random.Random) -> Question:
    start, trip = rng.randint(13 * 60, 21 * 60), rng.choice([15, 20, 25, 30, 35, 40, 45, 50])
    wrong = start + trip + rng.choice([-60, -20, -10, 10, 20, 60])
    return Question("train", {"a": _clock(start), "b": str(trip)}, _clock(start + trip), _clock(wrong))


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def _lives(rng: random.Random) -> Question:
    a, b = rng.sample(range(12), 2)
    c, d = rng.sample(range(8), 2)
    first = rng.random() < 0.5
    slots = {"a": str(a), "b": str(b), "c": str(c), "d": str(d), "e": str(c if first else d)}
    return Question("lives", slots, str(a if first else b), str(b if first else a))


def _row(kind: str, rows: int) -> Callable[[random.Random], Question]:
    def one(rng: random.Random) -> Question:
        row = rng.randrange(rows)
        return Question(kind, {"a": str(row)}, f"{row}:1", f"{row}:2")

    return one


def _greater(rng: random.Random) -> Question:
    a, b = rng.sample(range(11, 99), 2)
    return Question("greater", {"a": str(a), "b": str(b)}, *(("yes", "no") if a > b else ("no", "yes")))


def _even(rng: random.Random) -> Question:
    a = rng.randint(11, 999)
    return Question("even", {"a": str(a)}, *(("no", "yes") if a % 2 else ("yes", "no")))


_DRAW: dict[str, Callable[[random.Random], Question]] = {
    "sum": _sum,
    "product": _product,
    "road": _road,
    "year": _year,
    "train": _train,
    "lives": _lives,
    "capital": _row("capital", 14),
    "symbol": _row("symbol", 10),
    "greater": _greater,
    "even": _even,
}
