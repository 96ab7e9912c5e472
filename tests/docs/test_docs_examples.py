"""What README and docs show can be typed: commands, flags, make targets and config keys exist, Python blocks import what they use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.cli import app
from pipeline.config_file import _fields_at
from stages.sources import PREFIX

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docker").glob("*.md")),
]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
_SHOWN = re.compile(
    r"(?:^|`)\s*(?:HYPOTHESIS_PROFILE=long )?((?:congrad|python -m pipeline|make)(?: [^`\n]*)?)", re.MULTILINE
)
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown(*programs: str) -> Iterator[tuple[str, str]]:
    """(page, command) of code spans, indented and fenced lines that begin with one of the programs."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [line for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)
        code += [line for _, block in _FENCED.findall(text) for line in block.splitlines()]
        for line in code:
            line = line.strip().split("  #")[0]
            for program in programs:
                if line.startswith(f"{program} "):
                    yield page.name, line.removeprefix(program).strip()


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, text)
        for page in PAGES
        for kind, text in _FENCED.findall(page.read_text(encoding="utf-8"))
        if kind == language
    ]


CLI = sorted(set(shown("congrad", "python -m pipeline")))
MAKE = sorted(set(shown("make")))


def test_there_is_something_to_check() -> None:
    assert len(CLI) > 10 and len(MAKE) > 10 and blocks("python") and blocks("yaml")


@pytest.mark.parametrize(("page", "line"), CLI)
def test_commands_and_flags_exist(page: str, line: str) -> None:
    name = line.split()[0]
    if name in ("--help", "…"):
        return
    assert name in COMMANDS, f"{page}: {line}"
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    for flag in re.findall(r"--[a-z][a-z-]*", line):
        assert flag in flags or flag == "--help", f"{page}: {line}"
    for key in re.findall(r"--set ([a-z_0-9.]+)=", line):
        assert key == "a.b" or key.split(".")[-1] in _fields_at(tuple(key.split(".")[:-1])), f"{page}: {line}"
    for path in re.findall(r"package:([\w./-]+)", line):
        assert (ROOT / "data" / path).exists(), f"{page}: {PREFIX}{path}"


@pytest.mark.parametrize(("page", "line"), MAKE)
def test_make_targets_exist(page: str, line: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert line.split()[0] in targets, f"{page}: make {line}"
    for path in re.findall(r"(?:tests|data|docs)/[\w./-]+", line):
        assert (ROOT / path).exists(), f"{page}: make {line}"


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_import_what_there_is(page: str, code: str) -> None:
    pytest.importorskip("torch")
    tree = ast.parse(code)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(body=imports, type_ignores=[]), page, "exec"), {})  # noqa: S102


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_yaml_blocks_hold_keys_that_there_are(page: str, code: str) -> None:
    places = ((), ("prompts", "sources"), ("pairs", "sources"), ("sft", "sources"))  # a list is of sources

    def check(value: Any, at: tuple[str | int, ...]) -> None:
        if isinstance(value, dict) and (known := _fields_at(at)):
            for key, inner in value.items():
                assert key in known, f"{page}: {'.'.join(map(str, (*at, key)))}"
                check(inner, (*at, key))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                check(inner, (*at, index))

    value = yaml.safe_load(code) or {}
    wrong = []
    for place in places if isinstance(value, list) else places[:1]:
        try:
            return check(value, place)
        except AssertionError as error:
            wrong.append(str(error))
    pytest.fail("; ".join(wrong))
