"""What README and docs show can be typed: commands parse, make targets exist, configs are valid, Python blocks run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.cli import app
from pipeline.config_file import _fields_at
from schemas.config import RunConfig
from schemas.config.sft import ConversationSource
from schemas.config.sources import PairSource, PromptSource
from schemas.sketches import sketch_array
from schemas.tables import TABLES, gradients_schema
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


def arguments_of(line: str) -> list[str]:
    """A line's arguments: without what explains it, and without what is optional."""
    typed = re.sub(r"\[[^]]*\]", "", re.split(r" {2,}|;| &$", line)[0])
    return shlex.split(typed)[1:]


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
    if line != name:  # a name in a sentence is no command line
        COMMANDS[name].make_context(name, arguments_of(line))
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


_DIM = 6048
"""Of the demo's sketches: `gradients.sketch.dim` is only their upper bound."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables of the runs that the examples read."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("mine", "demo"):
        for table in ("pairs", "scores", "curated", "gradients"):
            schema = gradients_schema(_DIM) if table == "gradients" else TABLES[table].schema
            path = folder / "runs" / name / "round-0" / table / "part-00000.parquet"
            path.parent.mkdir(parents=True)
            row = {field.name: pa.nulls(1, field.type) for field in schema}  # datasets reads no file without rows
            if table == "gradients":
                row["sketch"] = sketch_array(np.ones((1, _DIM), np.float16))
            pq.write_table(pa.table(row), path)
    (folder / "arena.csv").write_text("prompt,response_a,response_b,winner\nWho?,I.,You.,model_b\nWhy?,So.,No.,tie\n")
    (folder / "instructions.jsonl").write_text(
        '{"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"}\n'
    )
    (folder / "rated.jsonl").write_text('{"prompt": "Who?", "response": "I.", "helpfulness": 4}\n')
    rows_of = pytest.importorskip("stages.train.rows")
    rows_of.write_rows({"weight": pytest.importorskip("torch").ones(2, 3)}, folder / "checkpoint-50" / "weights")
    return folder


ALONE = [(page, code) for page, code in blocks("python") if "from pipeline import" not in code and page != "python.md"]
"""The others want a whole run: tests/end_to_end/test_e2e_python.py."""


@pytest.mark.parametrize(("page", "code"), ALONE)
def test_python_blocks_run(page: str, code: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(runs)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(runs / "cache"))
    shown: dict[str, Any] = {}
    exec(compile(code, page, "exec"), shown)  # noqa: S102
    if page == "tables.md" and "rows" in shown:  # numbers of another width than asked for would be null
        assert shown["rows"].tolist() == shown["numbers"].collect()["sketch"].to_list() == [[1.0] * _DIM]


BASE = {"name": "t", "languages": {"seen": ["en"]}, "model": {"policy": "some/model"}}


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_yaml_blocks_are_valid_configs(page: str, code: str) -> None:
    value = yaml.safe_load(code) or {}
    if isinstance(value, list):  # of sources, of one kind or another
        adapters = [TypeAdapter(list[kind]) for kind in (PairSource, PromptSource, ConversationSource)]
        assert any(_valid(adapter, value) for adapter in adapters), f"{page}: {code}"
        return
    prompts = (
        {}
        if "prompts" in value or "sources" in value.get("pairs", {})
        else {"prompts": {"sources": [{"path": "prompts.jsonl"}]}}
    )
    RunConfig.model_validate(BASE | prompts | value)


def _valid(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


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
