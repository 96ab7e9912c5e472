"""Any config file is either a valid config or one clear error."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import SHORT_NASTY, VALUE, cases, outcome_of
from hostile import NASTY
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config_file import dump, load_config
from schemas.config import RunConfig
from schemas.config.base import semantic_values
from schemas.errors import UserError
from schemas.ids import canonical_json
from stages.data import read_data

NAMES = ("starter", "demo", "curate")
TEXTS = [read_data(f"configs/{name}.yaml") for name in NAMES]
WHOLE = RunConfig.model_validate(yaml.safe_load(TEXTS[0])).model_dump(mode="json")
FRAGMENTS = st.sampled_from(
    [": ", "- ", "\n", "\t", "  ", "{", "}", "[", "]", "'", '"', "&a ", "*a", "<<: *a", "!!int ", "!x ", "? ", "|", ">",
     "%TAG", "---\n", "...\n", "#", "null", "~", ".nan", ".inf", "2001-13-45", "1:2:3", "0x", "1e999", "\x00", "\ufeff", "@"]
)  # fmt: skip


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from _paths(value[key], (*at, key))


PATHS = list(_paths(WHOLE))


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The whole valid config with one to three places changed, removed, renamed or added."""
    config = copy.deepcopy(WHOLE)
    for path in draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=3)):
        parent: Any = config
        for key in path[:-1]:
            parent = parent[key] if isinstance(parent, dict) and key in parent else None
        if not isinstance(parent, dict):
            continue
        match draw(st.sampled_from(["change", "change", "change", "remove", "rename", "add"])):
            case "change":
                parent[path[-1]] = draw(VALUE)
            case "remove":
                parent.pop(path[-1], None)
            case "rename":
                parent[draw(st.sampled_from(SHORT_NASTY))] = parent.pop(path[-1], None)
            case "add":
                parent[draw(st.sampled_from(SHORT_NASTY))] = draw(VALUE)
    return config


@st.composite
def scribbled(draw: st.DrawFn) -> bytes:
    """A shipped config with pieces of YAML syntax, nasty text or bytes put in or cut out."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 6))
        text = text[:at] + draw(st.one_of(FRAGMENTS, st.sampled_from(SHORT_NASTY))) + text[at + cut :]
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def check(found: RunConfig | UserError) -> None:
    """A config that is accepted can be stored, read again and fingerprinted."""
    if isinstance(found, RunConfig):
        path = Path(_FOLDER[0]) / "again.yaml"
        path.write_text(dump(found), encoding="utf-8")
        assert load_config(path) == found
        json.loads(canonical_json(semantic_values(found)))


_FOLDER: list[str] = []


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _FOLDER[:] = [str(tmp_path_factory.mktemp("configs"))]


@cases(150, 3000)
@given(mutated())
def test_a_mutated_config_is_valid_or_refused(config: dict[str, Any]) -> None:
    path = Path(_FOLDER[0]) / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    check(outcome_of("config values", lambda: load_config(path)))


@cases(60, 1500)
@given(scribbled())
def test_a_scribbled_config_is_valid_or_refused(data: bytes) -> None:
    path = Path(_FOLDER[0]) / "config.yaml"
    path.write_bytes(data)
    check(outcome_of("config text", lambda: load_config(path)))


@cases(60, 1000)
@given(
    st.sampled_from(PATHS).map(lambda path: ".".join(map(str, path))) | st.text(max_size=20),
    VALUE.map(lambda value: json.dumps(value)) | st.sampled_from(SHORT_NASTY),
)
def test_any_override_is_valid_or_refused(key: str, value: str) -> None:
    path = Path(_FOLDER[0]) / "config.yaml"
    path.write_text(TEXTS[0], encoding="utf-8")
    check(outcome_of("config overrides", lambda: load_config(path, [f"{key}={value}"])))


@pytest.mark.parametrize(
    "name", [name for name in NASTY if "\ud800" not in NASTY[name] and "\udfff" not in NASTY[name]]
)
def test_any_text_in_a_config_is_stored_as_it_is(name: str) -> None:
    config = RunConfig.model_validate(
        {**WHOLE, "banner": NASTY[name], "run_dir": f"runs/{NASTY[name][:50]}".replace("\0", "")}
    )
    check(config)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: 2001-13-45\n", "month"),
        ("? [1, 2]\n: 3\n", "no name"),
        ("a: &a [*a]\n", "nested deeper"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("seed: " + "9" * 5000, "5,000 digits"),
        ('text: {chat_template_kwargs: {"\\ud83d\\ude00": 1}}\n', "half of a character"),
        ('banner: "\\ud800"\n', "half of a character"),
        ("x: !!binary '##'\n", "YAML tag"),
        ("x: !!python/object/apply:os.system ['true']\n", "YAML tag"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)), "values"),
    ],
    ids=["date", "list key", "cycle", "depth", "digits", "surrogate key", "surrogate", "binary tag", "python tag", "billion laughs"],
)  # fmt: skip
def test_yaml_that_is_no_config_is_refused_at_once(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=what):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "..", ".", "", "/etc", "a\x00", "a\n", "-rf", "~", "a b", "con:", "x" * 101, "\u202ea", "ａ"],
)
def test_a_run_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**WHOLE, "name": name}))
    with pytest.raises(UserError, match=r"name"):
        load_config(tmp_path / "c.yaml")
