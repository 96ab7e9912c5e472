"""`export`: curated pairs as a Hugging Face dataset folder with a card; pushed to the hub when asked."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import polars as pl
import yaml

from pipeline.inspect import table_files
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError, first_line
from stages.text.markdown import escape

_OURS = re.compile(r"README\.md|data/train-\d{5}-of-\d{5}\.parquet")
_MARK = ".congrad-export.json"
"""In every exported folder: which files the export wrote. Nothing else is ever overwritten or deleted."""


def export_dataset(config: RunConfig, out: Path, round_: int | None, push: str | None, private: bool) -> Path:
    """Write data/train-*.parquet and README.md; returns the folder.

    round_: default the last finished one. Raises UserError if nothing is curated, or the folder holds anything that an export did not
    write or cannot be written.
    """
    wanted = range(config.rounds - 1, -1, -1) if round_ is None else [round_]
    parts: list[Path] = []
    for candidate in wanted:
        try:
            parts, round_ = table_files(config.folder, "curated", candidate), candidate
            break
        except UserError:
            if candidate == wanted[-1]:
                raise
    before = _written_before(out)
    counts = pl.scan_parquet(parts, glob=False).group_by("language").len().sort("language").collect().rows()
    names = [f"data/train-{index:05d}-of-{len(parts):05d}.parquet" for index in range(len(parts))]
    files.write_json(
        out / _MARK, {"files": sorted({*before, *names, "README.md"})}
    )  # first: a half-written export is known
    for name, part in zip(names, parts, strict=True):
        with files.publishing(out / name) as temporary:
            shutil.copyfile(part, temporary)
    files.remove(out / name for name in before if name not in (*names, "README.md"))
    files.write_text(out / "README.md", dataset_card(config, round_ or 0, dict(counts)))
    files.write_json(out / _MARK, {"files": sorted([*names, "README.md"])})
    if push:
        _push(out, push, private)
    return out


def _written_before(out: Path) -> list[str]:
    """Files of an earlier export in the folder. Raises UserError where there is anything else, or a link."""
    if not os.path.lexists(out):
        return []
    entries = [out, *sorted(out.rglob("*"))] if out.is_dir() and not out.is_symlink() else [out]
    links = [entry for entry in entries if entry.is_symlink()]
    if links or not out.is_dir():
        what = f"{links[0]} is a link" if links else "This is no folder"
        raise UserError(
            f"The dataset is not written here: {what}", where=str(out), fix="Name another folder with --out."
        )
    written = _marked(out / _MARK)
    known = {out, out / "data", out / _MARK, *(out / name for name in written)}
    foreign = [entry for entry in entries if entry not in known and not files.is_temporary(entry)]
    if foreign:
        raise UserError(
            "This folder holds something else",
            where=str(foreign[0]),
            fix="Name an empty folder, or one that an export wrote, with --out.",
        )
    return written


def _marked(mark: Path) -> list[str]:
    try:
        named = json.loads(mark.read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []
    return (
        [name for name in named if isinstance(name, str) and _OURS.fullmatch(name)] if isinstance(named, list) else []
    )


def dataset_card(config: RunConfig, round_: int, counts: dict[str, int]) -> str:
    """Model-card Markdown with YAML metadata. counts: language -> pairs."""
    meta = yaml.safe_dump(
        {
            "language": sorted({code.split("-")[0] for code in counts}),
            "tags": ["preference", "dpo", "trl", "congrad"],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        },
        sort_keys=False,
        allow_unicode=True,
    )
    rows = "\n".join(f"| {escape(language)} | {count:,} |" for language, count in sorted(counts.items()))
    answers = f"answers of {escape(config.model.policy)}, judged by a model"
    origin = "an existing preference data set" if config.imported else answers
    kept = "by gradient conflict" if config.select.by == "conflict" else "by a baseline, not by gradient conflict"
    return f"""---
{meta}---
# {escape(config.name)}: curated preference pairs

{sum(counts.values()):,} preference pairs (columns `prompt`, `chosen`, `rejected` as messages) made from {origin}
and kept {kept} (round {round_}): pairs were ranked by `select.by: {config.select.by}` and a share of
{config.select.keep:g} was kept. ConGrad's code was never published; keep ratio, sketch size and similarity measure
are this pipeline's choices.
The texts were not checked by people and may be wrong or harmful.

| language | pairs |
|---|---|
{rows}
"""


def _push(folder: Path, repo: str, private: bool) -> None:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError("Pushing needs the package huggingface_hub", fix="pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type="dataset", allow_patterns=["data/*", "README.md"])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"Pushing to {repo} failed: {first_line(error)}",
            fix=f"The dataset is written to {folder}; `hf auth login`, then export again.",
        ) from error
