"""The registry of reason codes holds what the stages give, no more and no less, and names keys that there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from schemas.docs import documents
from schemas.reasons import OFF_TOPIC, REASONS, explained
from stages.catalog import BY_NAME

STAGES = Path(__file__).resolve().parents[2] / "stages"
UNITS = {"prompt", "candidate", "pair", "comparison", "question", "row"}
DROP_FIELDS = ["unit", "row_id", "language", "reason", "detail", "failed"]
CHOOSERS = {"evaluate/leak.py": "overlap", "prompts/duplicates.py": "check"}
"""Functions that choose a code which their caller gives on."""
GIVEN_ON = {"reason", "bad.reason", "row['reason']", "verdict[0]", "value.reason", "content.reason"}
"""Codes that were chosen elsewhere: by a caller, in a BadRow or an Unreadable cell, by pl.lit in a column, by CHOOSERS."""


@dataclass(frozen=True)
class Found:
    """A reason code in the code; `given`: text of the expression when it is no literal."""

    stage: str
    code: str | None
    given: str
    failed: bool


class Module:
    """A module of stages and the reason codes it gives."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(STAGES).as_posix()
        self.stage = path.stem if path.stem in BY_NAME else self.name.split("/")[0]
        self.nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        self.constants = {"OFF_TOPIC": OFF_TOPIC} | dict(self._constants())

    def found(self) -> Iterator[Found]:
        """By calls of Drop, BadRow, Unreadable, `Item.dropped` and functions with a parameter `reason`; in columns; by CHOOSERS."""
        parameters = {
            "Drop": DROP_FIELDS,
            "BadRow": ["reason", "detail"],
            "Unreadable": ["reason", "detail"],
            "dropped": DROP_FIELDS[3:],
        }
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args if argument.arg != "self"]
                if "reason" in names and node.name != "__init__":
                    parameters[node.name] = names
                if node.name == CHOOSERS.get(self.name):
                    yield from self._chosen(node)
        for node in self.nodes:
            if isinstance(node, ast.Call) and (names := parameters.get(_name(node.func), [])):
                given = _arguments(node, names)
                failed = isinstance(value := given.get("failed"), ast.Constant) and value.value is True
                yield from self._codes(given["reason"], failed)
            is_column = isinstance(node, ast.keyword) and node.arg == "reason"
            if is_column or (isinstance(node, ast.Assign) and _name(node.targets[0]) == "reason"):
                for call in ast.walk(node.value):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "pl.lit":
                        yield from self._codes(call.args[0])

    def _codes(self, node: ast.expr, failed: bool = False) -> Iterator[Found]:
        if isinstance(node, ast.IfExp):
            yield from self._codes(node.body, failed)
            yield from self._codes(node.orelse, failed)
            return
        code = self.constants.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            code = node.value
        yield Found(self.stage, code, ast.unparse(node), failed)

    def _chosen(self, function: ast.FunctionDef) -> Iterator[Found]:
        """Literals that are returned, alone or as the first entry of a tuple."""
        for node in ast.walk(function):
            value = node.value if isinstance(node, ast.Return) else None
            if isinstance(node, ast.Tuple) and node.elts:
                value = node.elts[0]
            if value is not None:
                yield from (one for one in self._codes(value) if one.code is not None)

    def _constants(self) -> Iterator[tuple[str, str]]:
        for node in self.nodes:
            if not isinstance(node, ast.Assign):
                continue
            target, value = node.targets[0], node.value
            both = (
                zip(target.elts, value.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                else [(target, value)]
            )
            for name, one in both:
                if _name(name).isupper() and isinstance(one, ast.Constant) and isinstance(one.value, str):
                    yield _name(name), one.value


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _arguments(call: ast.Call, names: list[str]) -> dict[str, ast.expr]:
    """Parameter -> expression. A starred first argument stands for what says where: unit, row_id, language."""
    if call.args and isinstance(call.args[0], ast.Starred):
        names = [names[0], *names[3:]]
    return dict(zip(names, call.args, strict=False)) | {one.arg: one.value for one in call.keywords if one.arg}


MODULES = [Module(path) for path in sorted(STAGES.rglob("*.py"))]
FOUND = [one for module in MODULES for one in module.found()]


def test_every_code_the_stages_give_is_in_the_registry_and_no_other():
    assert {one.code for one in FOUND if one.code is not None} == set(REASONS)


def test_codes_that_are_no_literal_come_from_where_this_test_looks():
    given_on = {one.given for one in FOUND if one.code is None}
    assert given_on == GIVEN_ON, "a code given in a new way: collect it here"
    assert set(CHOOSERS) <= {module.name for module in MODULES}


def test_errors_are_told_from_rules_as_the_stages_do():
    codes = {failed: {one.code for one in FOUND if one.failed == failed and one.code} for failed in (True, False)}
    assert codes[True] == {code for code, reason in REASONS.items() if reason.failed}
    assert not codes[True] & codes[False]


def _where(code: str) -> dict[str, set[str]]:
    """Stage -> units."""
    found: dict[str, set[str]] = {}
    for part in REASONS[code].where.split("; "):
        stages, units = part.split(": ")
        for stage in stages.split(", "):
            found.setdefault(stage, set()).update(units.split(", "))
    return found


def test_every_code_names_the_stages_that_give_it_and_their_units():
    for code in REASONS:
        where = _where(code)
        assert set(where) <= set(BY_NAME), code
        assert set().union(*where.values()) <= UNITS, code
    for one in FOUND:
        if one.code is not None and one.stage in BY_NAME:
            assert one.stage in _where(one.code), one


def test_keys_and_tables_that_are_named_exist():
    keys = re.findall(r"^\| `([^`]+)` \|", documents()["docs/config.md"], flags=re.M)
    tables = {spec.writes[0] for spec in BY_NAME.values() if spec.writes}
    for code, reason in REASONS.items():
        for name in re.findall(r"`([^`]+)`", f"{reason.meaning} {reason.change}"):
            key, _, table = name.split(": ")[0], *name.partition("dropped/")[1:]
            known = any(re.search(rf"(^|\.){re.escape(key)}($|\.|\[)", one) for one in keys)
            assert table in tables if table else known, f"{code}: {name}"


def test_the_page_and_the_report_say_it():
    page = documents()["docs/tables.md"].split("\n## Reasons\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.M) == list(REASONS)
    assert explained("below_cut").endswith("Change: select.keep; the ranking: select.by, select.quota")
    assert explained("of another version") == ""
