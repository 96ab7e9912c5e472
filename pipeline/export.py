"""`export`: curated pairs as a Hugging Face dataset folder with a card; pushed to the hub when asked."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from pipeline.dataset_card import Contents, dataset_card
from pipeline.fingerprint import content_of
from pipeline.plan import State
from pipeline.status import recorded_planner
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError, first_line
from schemas.ids import content_id

_TABLE = "curated"

_OURS = re.compile(r"README\.md|data/train-\d{5}-of-\d{5}(-[0-9a-f]{16})?\.parquet")
_MARK = ".congrad-export.json"
"""In every exported folder: which files the export wrote. Nothing else is ever overwritten or deleted."""


def export_dataset(config: RunConfig, out: Path, round_: int | None, push: str | None, private: bool) -> Path:
    """Write data/train-*-HASH.parquet and README.md; returns the folder.

    The hash of the content is in the files' names and in the card, because `datasets` takes a folder of the same name with the same
    card for the same data, and would load what it cached of another export.

    round_: default the last finished one. Raises UserError if nothing current is curated or the folder holds anything that an export did not
    write or cannot be written.
    """
    states = recorded_planner(config, config.folder).states()
    made = _curated(config, states, round_)
    before = _written_before(out)
    assert made.manifest is not None
    records = made.manifest.table_files(_TABLE)
    parts = [config.folder / record.path for record in records]
    if bad := [record for record in records if not files.is_intact(config.folder, record, thorough=True)]:
        raise UserError(
            "This part of curated is no longer what was written", where=bad[0].path, fix="Delete it and run again."
        )
    content = content_id(content_of(records))[:16]
    counts = pl.scan_parquet(parts, glob=False).group_by("language").len().sort("language").collect().rows()
    names = [f"data/train-{index:05d}-of-{len(parts):05d}-{content}.parquet" for index in range(len(parts))]
    files.write_json(
        out / _MARK, {"files": sorted({*before, *names, "README.md"})}
    )  # first: a half-written export is known
    for name, part in zip(names, parts, strict=True):
        with files.publishing(out / name) as temporary:
            shutil.copyfile(part, temporary)
    files.remove(out / name for name in before if name not in (*names, "README.md"))
    contents = Contents(
        f"data/train-*-{content}.parquet", dict(counts), sum(r.bytes for r in records), sum(map(_raw_bytes, parts))
    )
    upstream = states[: states.index(made) + 1]
    through = [s.manifest for s in upstream if s.kind == "done" and s.manifest and _is_of(s, made)]
    files.write_text(out / "README.md", dataset_card(config, made.step.round, contents, through))
    files.write_json(out / _MARK, {"files": sorted([*names, "README.md"])})
    if push:
        _push(out, push, private)
    return out


def _curated(config: RunConfig, states: list[State], round_: int | None) -> State:
    """The step whose curated pairs are exported: of the round asked for, or the last that has some."""
    steps = [s for s in states if _TABLE in s.step.spec.writes and round_ in (None, s.step.round)]
    done = [s for s in steps if s.kind == "done"]
    if done:
        return done[-1]
    where, last = str(config.folder), steps[-1] if steps else None
    if last is not None and last.kind in ("changed", "stale"):
        raise UserError(
            f"The curated pairs that are there are of other settings than the run's: {'; '.join(last.why)}",
            where=where,
            fix="Run the pipeline with the settings you want, then export: results that were finished are found, not made anew.",
        )
    raise UserError(
        f"Round {round_ or 0} of this run has no finished table 'curated'",
        where=where,
        fix="Run it first: congrad run CONFIG.",
    )


def _is_of(state: State, made: State) -> bool:
    """Whether a stage comes before the curated pairs: of their round, or of all rounds."""
    return not state.step.spec.per_round or state.step.round == made.step.round


def _raw_bytes(part: Path) -> int:
    meta = pq.read_metadata(part)
    return sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))


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


def _push(folder: Path, repo: str, private: bool) -> None:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError("Pushing needs the package huggingface_hub", fix="pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            repo_type="dataset",
            allow_patterns=["data/*", "README.md"],
            delete_patterns=["data/*"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"Pushing to {repo} failed: {first_line(error)}",
            fix=f"The dataset is written to {folder}; `hf auth login`, then export again.",
        ) from error
