"""Conditions over a table's columns (`inspect --where`, `train.orthalign.objectives[].where`), as a tree of allowed nodes.

SQL's notation, and nothing of SQL but what compares columns of one row: a condition may come from a shared config, and a SQL engine
given the whole language reads files and opens connections from inside a sub-query. No function is known that is not listed
here. `stages.conditions` evaluates the tree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from schemas.errors import UserError

Literal_ = str | int | float | bool | None

FUNCTIONS = {
    "abs": 1, "round": 2, "floor": 1, "ceil": 1,
    "length": 1, "lower": 1, "upper": 1, "starts_with": 2, "ends_with": 2, "contains": 2,
    "array_length": 1, "array_contains": 2,
    "coalesce": -1,
}  # fmt: skip
"""Name -> how many arguments; -1: one or more."""

_MOST_CHARACTERS = 200_000
_MOST_NODES = 500
_DEEPEST = 50
_LONGEST_PATTERN = 1_000
_INT64 = range(-(2**63), 2**63)
_TOKEN = re.compile(
    r"""\s*(?: (?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)
          | (?P<string>'(?:[^']|'')*')
          | (?P<quoted>"(?:[^"]|"")*"|`[^`]*`)
          | (?P<name>[^\W\d]\w*)
          | (?P<sign><=|>=|<>|!=|==|\|\||[-+*/%=<>(),]) )""",
    re.VERBOSE,
)
_KEYWORDS = frozenset(
    ["and", "or", "not", "in", "is", "null", "true", "false", "between", "like", "ilike", "distinct", "from"]
)
_COMPARE = {"=": "=", "==": "=", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


@dataclass(frozen=True)
class Column:
    """A column's name."""

    name: str


@dataclass(frozen=True)
class Value:
    """A literal."""

    value: Literal_


@dataclass(frozen=True)
class Call:
    """An operator or function of `FUNCTIONS` with its arguments; "and" and "or" take any number of them."""

    op: str
    args: tuple[Condition, ...]


Condition = Column | Value | Call


def parse_condition(text: str, where: str = "") -> Condition:
    """The tree of a condition such as `score < 2 AND language IN ('de', 'fr')`.

    Raises UserError, naming the place, for anything but comparisons, AND, OR, NOT, IN, BETWEEN, IS [NOT] NULL, IS [NOT] DISTINCT FROM,
    LIKE, arithmetic and the functions above, and for a condition without bound. where: of the error.
    """
    return _Parser(text, where).whole()


def columns_named(condition: Condition) -> set[str]:
    """Names of the columns that a condition reads."""
    if isinstance(condition, Column):
        return {condition.name}
    return set().union(*map(columns_named, condition.args)) if isinstance(condition, Call) else set()


class _Parser:
    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where
        self._nodes = self._depth = self._next = 0
        if len(text) > _MOST_CHARACTERS:
            self._refuse(f"it has {len(text):,} characters, and at most {_MOST_CHARACTERS:,} are read")
        self._tokens = list(self._scan())

    def whole(self) -> Condition:
        found = self._or()
        if self._next < len(self._tokens):
            self._unexpected()
        return found

    def _scan(self) -> list[tuple[str, str]]:
        tokens, at, end = [], 0, len(self._text.rstrip())
        while at < end:
            match = _TOKEN.match(self._text, at)
            if match is None:
                self._refuse(f"{self._text[at : at + 20].strip()!r} at character {at + 1} belongs to no condition")
            at = match.end()
            kind = match.lastgroup or ""
            word = match[kind]
            tokens.append(("keyword", word.lower()) if kind == "name" and word.lower() in _KEYWORDS else (kind, word))
        return tokens

    def _or(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._refuse(f"it is nested deeper than {_DEEPEST}")
        terms = [self._and()]
        while self._take("or"):
            terms.append(self._and())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else self._call("or", *terms)

    def _and(self) -> Condition:
        terms = [self._not()]
        while self._take("and"):
            terms.append(self._not())
        return terms[0] if len(terms) == 1 else self._call("and", *terms)

    def _not(self) -> Condition:
        negations = 0
        while self._take("not"):
            negations += 1
        found = self._comparison()
        return self._call("not", found) if negations % 2 else found

    def _comparison(self) -> Condition:
        left = self._sum()
        kind, word = self._peek()
        if kind == "sign" and word in _COMPARE:
            self._next += 1
            return self._call(_COMPARE[word], left, self._sum())
        if self._take("is"):
            negated = self._take("not")
            if self._take("distinct"):
                self._need("from")
                found = self._call("is distinct from", left, self._sum())
            elif self._take("null"):
                found = self._call("is null", left)
            elif (truth := self._take("true")) or self._take("false"):
                found = self._call("is distinct from", left, Value(truth))
                negated = not negated
            else:
                self._unexpected()
            return self._call("not", found) if negated else found
        negated = self._take("not")
        if self._take("in"):
            found = self._call("in", left, *self._listed())
        elif self._take("between"):
            low = self._sum()
            self._need("and")
            found = self._call("between", left, low, self._sum())
        elif (like := self._take("like")) or self._take("ilike"):
            kind, word = self._peek()
            if kind != "string" or len(word) > _LONGEST_PATTERN:
                self._refuse(f"LIKE needs a quoted pattern of at most {_LONGEST_PATTERN:,} characters")
            found = self._call("like" if like else "ilike", left, self._primary())
        elif negated:
            self._unexpected()
        else:
            return left
        return self._call("not", found) if negated else found

    def _listed(self) -> list[Condition]:
        """The literals of IN."""
        self._need("(")
        values: list[Condition] = []
        while True:
            negative = self._take("-")
            kind, word = self._peek()
            if kind not in ("number", "string") or (negative and kind != "number"):
                self._refuse("IN needs a list of numbers or quoted texts")
            self._next += 1
            values.append(Value(self._number(word, negative) if kind == "number" else _unquoted(word)))
            if not self._take(","):
                self._need(")")
                return values

    def _sum(self) -> Condition:
        found = self._product()
        while (sign := self._peek()) in (("sign", "+"), ("sign", "-"), ("sign", "||")):
            self._next += 1
            found = self._call(sign[1], found, self._product())
        return found

    def _product(self) -> Condition:
        found = self._signed()
        while (sign := self._peek()) in (("sign", "*"), ("sign", "/"), ("sign", "%")):
            self._next += 1
            found = self._call(sign[1], found, self._signed())
        return found

    def _signed(self) -> Condition:
        negative = False
        while (minus := self._take("-")) or self._take("+"):
            negative ^= minus
        if negative and self._peek()[0] == "number":
            self._next += 1
            return Value(self._number(self._tokens[self._next - 1][1], True))
        found = self._primary()
        return self._call("-", Value(0), found) if negative else found

    def _primary(self) -> Condition:
        kind, word = self._peek()
        self._next += 1
        match kind:
            case "number":
                return Value(self._number(word, False))
            case "string":
                return Value(_unquoted(word))
            case "quoted":
                return Column(word[1:-1].replace('""', '"'))
            case "keyword" if word in ("null", "true", "false"):
                return Value({"null": None, "true": True, "false": False}[word])
            case "name" if self._take("("):
                return self._function(word)
            case "name":
                return Column(word)
            case "sign" if word == "(":
                found = self._or()
                self._need(")")
                return found
        self._next -= 1
        self._unexpected()

    def _function(self, word: str) -> Condition:
        name = word.lower()
        if name not in FUNCTIONS:
            self._refuse(f"there is no function {word!r} here; there are {', '.join(FUNCTIONS)}")
        args = [self._or()]
        while self._take(","):
            args.append(self._or())
        self._need(")")
        if name == "round" and len(args) == 1:
            args.append(Value(0))
        if FUNCTIONS[name] not in (-1, len(args)):
            self._refuse(f"{word} takes {FUNCTIONS[name]} arguments, and {len(args)} are given")
        if name == "round" and not (isinstance(args[1], Value) and args[1].value in range(16)):
            self._refuse("round takes a number of decimals, 0 to 15")
        return self._call(name, *args)

    def _number(self, word: str, negative: bool) -> int | float:
        if word.isascii() and word.isdigit():
            whole = int(word) * (-1 if negative else 1) if len(word) < 20 else None
            if whole is None or whole not in _INT64:
                self._refuse(f"the number {word[:20]}… does not fit 64 bits")
            return whole
        return -float(word) if negative else float(word)

    def _call(self, op: str, *args: Condition) -> Call:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            self._refuse(f"it has more than {_MOST_NODES} operators; a long list of values goes into one IN (…)")
        return Call(op, args)

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._next] if self._next < len(self._tokens) else ("end", "")

    def _take(self, word: str) -> bool:
        kind, found = self._peek()
        if kind in ("keyword", "sign") and found == word:
            self._next += 1
            return True
        return False

    def _need(self, word: str) -> None:
        if not self._take(word):
            self._unexpected(f", where {word.upper()} was expected")

    def _unexpected(self, more: str = "") -> NoReturn:
        kind, word = self._peek()
        self._refuse(("it ends too early" if kind == "end" else f"unexpected {word[:40]!r}") + more)

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(
            f"The condition cannot be read: {why}",
            where=self._where,
            fix="Compare columns: = != < <= > >=, AND, OR, NOT, IN (…), BETWEEN, IS NULL, LIKE, arithmetic, "
            f"{', '.join(FUNCTIONS)}.",
        )


def _unquoted(word: str) -> str:
    return word[1:-1].replace("''", "'")
