"""`python -m schemas.docs` writes docs/tables.md, docs/config.md and data/configs/schema.json from the schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.config import RunConfig
from schemas.config.base import conditions_of, is_execution
from schemas.config.used import in_words
from schemas.errors import UserError
from schemas.reasons import REASONS
from schemas.tables import TABLES, gradients_schema, products_schema

_MADE = "<!-- Made by `python -m schemas.docs`. Change the schemas, not this file. -->\n"

_TABLES_INTRO = """
# Tables

Every table is a folder of Parquet files that holds nothing else, so that this works for each of them:

```python
import polars as pl

pl.scan_parquet("runs/demo/round-0/pairs/*.parquet")
```

```text
runs/<name>/
  run.yaml                          the resolved config; rerunning from it alone repeats the run
  events.jsonl, logs/
  prompts/part-00000.parquet        shared by all rounds
  conversations/, sft_metrics/, sft/   only with sft.sources: what the policy of round 0 was made from, and its model
  round-0/<table>/part-00000.parquet
  _dropped/<table>/, round-0/_dropped/<table>/   input rows that were not kept, each with its reason
  _state/<stage>/, round-0/_state/<stage>/   plan.json, part-00000.json …, _stage.json: what is done, with row counts and hashes
  round-0/train/, evaluate/         checkpoints and models
  _kept/<stage>/, round-0/_kept/<stage>/   finished results of other settings, by fingerprint (execution.keep_results)
  report.html
```

For every stage, unit and language: rows in = kept + dropped (with a reason) + failed. Ids are content hashes, languages are
BCP 47 codes. A column is never null unless the table below says so.
"""

_REASONS_INTRO = """
## Reasons

What `reason` says in dropped rows (`congrad inspect RUN dropped/TABLE`) and in `rejected`; `detail` has the figures.
An *error* counts against `execution.max_failed_fraction`; the others are rules. `fields` are those of the row's source.

| reason | stages: units | meaning | what to change |
| --- | --- | --- | --- |
"""

_CONFIG_INTRO = """
# Config

One YAML file describes a run. Unknown keys are refused. `--set section.key=value` overrides a key on the command line.
Some keys only matter with another setting (*only with …*; of a section: all its keys). Setting one without it, to anything but its
default, is an error.
`data/configs/schema.json` is the JSON schema for editors; with the YAML language server, begin a config with

```yaml
# yaml-language-server: $schema=<path to>/data/configs/schema.json
```

Role: *semantic* keys change results: changing one repeats the stages that use it. *Execution* keys (speed, place, display) do not by
themselves, and may change before a run is resumed. Names of models are execution keys because a model counts by the hash of its content: another model
repeats its stages, a moved folder does not. `rounds` only adds rounds. `[]` in a key means each entry of a list.
"""


@dataclass(frozen=True)
class ConfigKey:
    """One line of docs/config.md."""

    path: str
    type: str
    default: str
    role: str
    description: str


_SKETCHES = """
A sketch is bytes, two a number, which Parquet reads sixty times faster than a list. Back to numbers, bit for bit, in Polars and in NumPy:

```python
import numpy as np
import polars as pl

gradients = pl.scan_parquet("runs/demo/round-0/gradients/*.parquet")
dim = len(gradients.select(pl.col("sketch").first()).collect().item()) // 2
as_numbers = pl.col("sketch").bin.reinterpret(dtype=pl.Array(pl.Float16, dim), endianness="little")
numbers = gradients.with_columns(as_numbers)
rows = np.frombuffer(b"".join(gradients.collect()["sketch"]), "<f2").reshape(-1, dim)
```

Runs made before this was so have lists of float16 in the column (`fixed_size_list`): every command reads both.
"""


def documents() -> dict[str, str]:
    """Path in the repository -> content of every generated file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return {
        "docs/tables.md": tables_page(),
        "docs/config.md": config_page(),
        "data/configs/schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def tables_page() -> str:
    """Every column of every table with its type and meaning, then every reason code."""
    parts = [_MADE, _TABLES_INTRO]
    for name, row, schema in _tables():
        parts.append(f"\n## {name}\n\nA row is {row}.\n\n| column | type | meaning |\n| --- | --- | --- |\n")
        for field in schema:
            meaning = (field.metadata or {}).get(b"meaning", b"").decode()
            null = ", may be null" if field.nullable else ""
            parts.append(f"| `{field.name}` | {_arrow_type(field.type)}{null} | {_cell(meaning)} |\n")
        if name == "gradients":
            parts.append(_SKETCHES)
    parts.append(_REASONS_INTRO)
    for code, reason in REASONS.items():
        meaning = f"*error*: {reason.meaning}" if reason.failed else reason.meaning
        parts.append(f"| `{code}` | {reason.where} | {_cell(meaning)} | {_cell(reason.change)} |\n")
    return "".join(parts)


def _tables() -> Iterator[tuple[str, str, pa.Schema]]:
    for table in TABLES.values():
        if table.name == "scores":
            row = "the compressed gradient of a training pair; `dim` is at most `gradients.sketch.dim`"
            yield "gradients", row, gradients_schema(8192, both_sides=True)
            row = (
                "the same with `sketch.method: one_sided`, which stores products with the directions (in `gradients/`)"
            )
            yield "gradients, one-sided", row, products_schema(1, 1)
        yield table.name, table.row, table.schema


def _arrow_type(type_: pa.DataType) -> str:
    if pa.types.is_fixed_size_binary(type_):
        return "2 x `dim` bytes"
    if pa.types.is_fixed_size_list(type_):
        size = "`dim` " if type_.list_size > 1 else ""
        return f"list of {size}{_arrow_type(type_.value_type)}"
    if pa.types.is_list(type_):
        return f"list of {_arrow_type(type_.value_type)}"
    if pa.types.is_struct(type_):
        return "{" + ", ".join(f"{field.name}: {_arrow_type(field.type)}" for field in type_) + "}"
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(type_), str(type_))


def config_page() -> str:
    """Every key with its type, default, role and meaning: general keys first, then a table per section."""
    parts = [_MADE, _CONFIG_INTRO, "\n## General\n", _KEY_HEADER]
    sections = {name: field for name, field in RunConfig.model_fields.items() if _model(field.annotation)}
    for name, field in RunConfig.model_fields.items():
        if name not in sections:
            parts.append(_line(_key(name, field, field.default, False)))
    for name, field in sections.items():
        model = _model(field.annotation)
        assert model is not None
        doc = " ".join((model.__doc__ or "").split())
        if only := _only(field, name):
            doc = f"{doc} {only[0].upper()}{only[1:]}."
        parts += [f"\n## {name}\n\n{doc}\n", _KEY_HEADER]
        default = None if field.is_required() else field.default
        parts += [_line(key) for key in _keys(name, model, default, is_execution(field))]
    return "".join(parts)


_KEY_HEADER = "\n| key | type | default | role | meaning |\n| --- | --- | --- | --- | --- |\n"


def _line(key: ConfigKey) -> str:
    return f"| `{key.path}` | {key.type} | {key.default} | {key.role} | {key.description} |\n"


def _keys(prefix: str, model: type[BaseModel], default: BaseModel | None, execution: bool) -> Iterator[ConfigKey]:
    """The keys below `prefix`: a nested section, or what a list's entries are, and then its own keys; default: the section's own."""
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}"
        inner, entry = _model(field.annotation), _entry(field.annotation)
        value = getattr(default, name) if default is not None else field.default
        role = execution or is_execution(field)
        if inner is not None:
            yield ConfigKey(path, "section", "–", "–", _meaning(path, field))
            yield from _keys(path, inner, value if isinstance(value, BaseModel) else None, role)
            continue
        yield _key(path, field, value, role)
        if entry is not None:
            yield from _keys(f"{path}[]", entry, None, role)


def _key(path: str, field: FieldInfo, default: Any, execution: bool) -> ConfigKey:
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in _LIMITS if hasattr(m, name)]
    return ConfigKey(
        path=path,
        type=_cell(", ".join([_type(field.annotation), *limits])),
        default="**required**" if field.is_required() else f"`{_cell(_yaml(default))}`",
        role="execution" if execution or is_execution(field) else "semantic",
        description=_meaning(path, field),
    )


def _meaning(path: str, field: FieldInfo) -> str:
    return _cell("; ".join(filter(None, [field.description, _only(field, path)])))


def _only(field: FieldInfo, path: str) -> str:
    conditions = conditions_of(field)
    return f"only with `{in_words(conditions, path.rpartition('.')[0])}`" if conditions else ""


_LIMITS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("min_length", "entries ≥"))


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(f"`{a}`" for a in arguments)
    if origin in (Union, UnionType):
        return " | ".join(_type(a) for a in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict or _model(annotation):
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false", Path: "path", NoneType: "null"}
    return names.get(annotation, "any")


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _entry(annotation: Any) -> type[BaseModel] | None:
    return _model(get_args(annotation)[0]) if get_origin(annotation) is list else None


def _yaml(value: Any) -> str:
    """A default as it would be written in the config, on one line."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json", exclude_defaults=True)
        return [plain(one) for one in item] if isinstance(item, list) else item

    value = plain(value)
    return str(value) if isinstance(value, (str, Path)) and str(value) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if "`" in text else text.replace("<", "&lt;")


def main() -> None:
    """Write the files of `documents` into the clone this module lies in. Raises UserError outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise UserError("The documentation is made in a clone of the repository", where=str(root))
    for name, content in documents().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
