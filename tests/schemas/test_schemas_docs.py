"""The generated documentation is complete and is what is committed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from schemas.config import RunConfig
from schemas.docs import documents
from schemas.manifests import SCHEMA_VERSION
from schemas.tables import TABLES, gradients_schema, products_schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(documents()))
def test_the_committed_file_is_what_the_schemas_say(name):
    assert (ROOT / name).read_text(encoding="utf-8") == documents()[name], "run: python -m schemas.docs"


def _lines_of(page: str, heading: str) -> list[list[str]]:
    body = re.split(r"^## ", page, flags=re.M)
    section = next(part for part in body if part.split("\n", 1)[0] == heading)
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_a_changed_column_comes_with_a_new_version():
    """Otherwise a half-done stage of an older run would go on with parts of two widths. Of the stage that makes the table
    (`stages.catalog`), or of all."""
    tables = [(name, [(f.name, str(f.type), f.nullable) for f in t.schema]) for name, t in sorted(TABLES.items())]
    digest = hashlib.sha256(repr(tables).encode()).hexdigest()[:16]
    assert (SCHEMA_VERSION, digest) == (3, "25001a8e5e023445"), (
        "raise the stage's version, or SCHEMA_VERSION; then write it here"
    )


def test_every_column_is_documented_with_type_and_meaning():
    page = documents()["docs/tables.md"]
    schemas = {name: table.schema for name, table in TABLES.items()} | {
        "gradients": gradients_schema(8192, both_sides=True),
        "gradients, one-sided": products_schema(1, 1),
    }
    for name, schema in schemas.items():
        rows = _lines_of(page, name)
        assert [row[0].strip("`") for row in rows] == schema.names
        assert all(len(row) == 3 and all(row) for row in rows), name


def _paths(schema: dict, node: dict, prefix: str = "") -> set[str]:
    """Keys and nested sections according to the JSON schema: an independent way to walk the models."""
    node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
    if "properties" in node:
        own = (
            {prefix} if prefix.count(".") > 1 and not prefix.endswith("[]") else set()
        )  # General and "## name" are headings
        return own.union(*(_paths(schema, value, f"{prefix}.{key}") for key, value in node["properties"].items()))
    if node.get("type") == "array" and "$ref" in node["items"]:
        return {prefix} | _paths(schema, node["items"], prefix + "[]")
    return {prefix}


def test_every_key_is_documented_with_type_default_role_and_meaning():
    page = documents()["docs/config.md"]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines() if "| `" in line
    ]
    rows = [row for row in rows if row[0].startswith("`")]
    schema = RunConfig.model_json_schema()
    assert {row[0].strip("`") for row in rows} == {path.lstrip(".") for path in _paths(schema, schema)}
    assert all(len(row) == 5 and all(row) for row in rows)
    assert {row[3] for row in rows if row[1] != "section"} == {"semantic", "execution"}


def test_the_condition_of_a_section_stands_where_its_keys_do():
    page = documents()["docs/config.md"]
    rows = {
        row[0].strip("`"): row for name in ("generate", "judge", "train", "evaluate") for row in _lines_of(page, name)
    }
    for section, condition in {
        "generate.sampling": "pairs.sources: []",
        "judge.sampling": "judge.method: expected_score or additive and pairs.sources: []",
        "train.lora": "train.method: lora",
        "train.orthalign": "train.orthalign.objectives other than []",
        "train.allo": "train.allo.mask other than none",
        "evaluate.benchmarks": "evaluate.tasks other than []",
        "evaluate.baseline": "evaluate.win_rate: true and evaluate.prompts_per_language other than 0",
    }.items():
        assert rows[section][4].endswith(f"only with `{condition}`")
    for section in ("prompts", "sft"):
        assert f"Only with `{section}.sources other than []`." in page


def test_documented_defaults_are_those_a_minimal_config_gets():
    minimal = {
        "name": "x",
        "languages": {"seen": ["en"]},
        "model": {"policy": "p"},
        "prompts": {"sources": [{"path": "p.jsonl"}]},
    }
    values = RunConfig.model_validate(minimal).model_dump(mode="json")
    checked = 0
    for line in documents()["docs/config.md"].splitlines():
        match = re.match(r"\| `([\w.]+)` \| .*? \| `((?:[^`])*)` \| (?:semantic|execution) \|", line)
        if not match or match[1] == "prompts.sources" or match[1] == "evaluate.authored":
            continue
        value = values
        for part in match[1].split("."):
            value = value[part]
        default = match[2].replace("\\|", "|")
        if isinstance(value, str):
            assert default == value, line
        elif isinstance(value, float):
            assert float(default) == value, line
        else:
            assert yaml.safe_load(default) == value, line
        checked += 1
    assert checked > 60


def test_the_json_schema_refuses_unknown_keys_everywhere():
    schema = json.loads(documents()["data/configs/schema.json"])
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) > 15
    assert all(one["additionalProperties"] is False for one in objects if "properties" in one)
