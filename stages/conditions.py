"""Rows of a table that fit a condition (`schemas.conditions`)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from functools import reduce

import polars as pl

from schemas.conditions import Call, Column, Condition, Value, columns_named, parse_condition
from schemas.errors import UserError, first_line

_BINARY: dict[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "%": lambda a, b: a % b,
    "||": lambda a, b: pl.concat_str(a, b),
    "is distinct from": lambda a, b: a.ne_missing(b),
    "starts_with": lambda a, b: a.str.starts_with(b),
    "ends_with": lambda a, b: a.str.ends_with(b),
    "contains": lambda a, b: a.str.contains(b, literal=True),
    "array_contains": lambda a, b: a.list.contains(b),
}
_UNARY: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "not": lambda a: ~a,
    "is null": lambda a: a.is_null(),
    "abs": lambda a: a.abs(),
    "floor": lambda a: a.floor(),
    "ceil": lambda a: a.ceil(),
    "length": lambda a: a.str.len_chars(),
    "lower": lambda a: a.str.to_lowercase(),
    "upper": lambda a: a.str.to_uppercase(),
    "array_length": lambda a: a.list.len(),
}


def fitting(frame: pl.LazyFrame, condition: str, where: str) -> pl.LazyFrame:
    """The rows that fit. where: of errors.

    Raises UserError for a condition that cannot be read, names no column of the table (it lists those), or does not fit their types.
    """
    tree = parse_condition(condition, where)
    schema = frame.collect_schema()
    for name in sorted(columns_named(tree) - set(schema)):
        raise UserError(f"There is no column {name!r}", where=where, fix=_columns(name, schema))
    try:
        fits = _expression(tree)
    except (pl.exceptions.PolarsError, ValueError, TypeError, OverflowError) as error:
        raise _does_not_fit(error, where) from error
    sample = collected(pl.DataFrame(schema=schema).clear(1).lazy().select(fits.alias("fits")), where)
    if sample.schema["fits"] != pl.Boolean:
        raise UserError("The condition is neither true nor false", where=where, fix="Compare something.")
    return frame.filter(fits)


def collected(frame: pl.LazyFrame, where: str) -> pl.DataFrame:
    """The rows of a frame that a condition filters. Raises UserError where it does not fit the types or values."""
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, ValueError, TypeError) as error:
        raise _does_not_fit(error, where) from error


def _does_not_fit(error: Exception, where: str) -> UserError:
    fix = "Compare numbers with numbers and texts with quoted texts."
    return UserError(f"The condition cannot be evaluated: {first_line(error)}", where=where, fix=fix)


def _columns(name: str, schema: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(schema), n=1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Columns: {', '.join(schema)}."


def _expression(node: Condition) -> pl.Expr:
    if isinstance(node, Column):
        return pl.col(node.name)  # of the schema, whose names are our own: none is one of Polars' patterns (^…$)
    if isinstance(node, Value):
        return pl.lit(node.value)
    if node.op in ("and", "or"):
        return _joined(node.op, [_expression(argument) for argument in node.args])
    if node.op == "in":
        listed = [value.value for value in node.args[1:] if isinstance(value, Value)]
        numbers = [value for value in listed if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(listed) and any(isinstance(number, float) for number in numbers):
            return _expression(node.args[0]).is_in([float(number) for number in numbers])
        return _expression(node.args[0]).is_in(listed)
    args = [_expression(argument) for argument in node.args]
    match node:
        case Call("like" | "ilike", (_, Value(str() as pattern))):
            return args[0].str.contains(_regex(pattern, ignore_case=node.op == "ilike"))
        case Call("between"):
            return args[0].is_between(args[1], args[2])
        case Call("round", (_, Value(int() as decimals))):
            return args[0].round(decimals)
        case Call("coalesce"):
            return pl.coalesce(args)
    return _UNARY[node.op](*args) if len(args) == 1 else _BINARY[node.op](*args)


def _joined(op: str, terms: list[pl.Expr]) -> pl.Expr:
    """A balanced tree: a chain of hundreds would be as deep as it is long."""
    if len(terms) > 2:
        half = len(terms) // 2
        terms = [_joined(op, terms[:half]), _joined(op, terms[half:])]
    return reduce(lambda a, b: (a & b) if op == "and" else (a | b), terms)


def _regex(pattern: str, *, ignore_case: bool) -> str:
    """SQL's % and _ as a regular expression (Rust's, which takes linear time)."""
    parts = (".*" if char == "%" else "." if char == "_" else re.escape(char) for char in re.sub("%+", "%", pattern))
    return f"(?s{'i' if ignore_case else ''})^{''.join(parts)}$"
