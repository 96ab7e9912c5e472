"""Runs that are there: found by path or name, and their config."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config_file import load_config
from schemas.config import RunConfig
from schemas.config.run import NAME
from schemas.errors import UserError
from schemas.paths import expanded, refuse_undecodable


def usable_path(path: Path) -> Path:
    """The path with `~` and variables written out. Raises UserError where that cannot be."""
    refuse_undecodable(os.path.abspath(path), "path")
    try:
        return Path(expanded(str(path)))
    except ValueError as error:
        raise UserError(f"The path cannot be used: {error}", where=str(path)) from None


def find_run(run: Path) -> Path:
    """The run directory of a path, as it is or with `~` and variables written out, or of a name under runs/. Raises UserError if there is
    none."""
    given = run if os.path.exists(run / "run.yaml") else usable_path(run)
    for folder in (given, Path("runs") / given):
        try:
            (folder / "run.yaml").stat()
        except PermissionError:
            raise UserError(
                "The run may not be read", where=str(folder), fix="Change its owner or permissions."
            ) from None
        except (OSError, ValueError):
            continue
        refuse_undecodable(os.path.abspath(folder), "the run's directory")
        return folder
    raise UserError(
        "There is no run here", where=str(run), fix="Give a run directory (it holds run.yaml), or a name under runs/."
    )


def config_given(path: str | Path, settings: Sequence[str] = (), run_dir: Path | None = None) -> RunConfig:
    """The validated config of a YAML file, or of a shipped one (`package:configs/demo.yaml`), with `a.b=value` settings applied. A run's own
    run.yaml is that run's wherever it lies now, unless `run_dir` or a setting says where the run is to be.

    Raises UserError naming the file, the line and the key.
    """
    path = Path(path)
    config, folder = load_config(path, settings, run_dir), usable_path(path).parent
    own = path.name == "run.yaml" and any(
        next(folder.glob(sign), None) for sign in ("_state", "round-*/_state", "events.jsonl")
    )
    named = run_dir is not None or any(text.partition("=")[0] in ("name", "run_dir") for text in settings)
    if own and not named and config.folder.resolve() != folder.resolve():
        return config_of(folder, settings)
    return config


def config_of(
    folder: Path, settings: Sequence[str] = (), say: Callable[[str], None] = lambda message: None
) -> RunConfig:
    """The run's config, with the folder it lies in now (a moved run still works) and `a.b=value` settings applied. say: told which keys of the
    run these leave without a use, which are left out.

    Raises UserError for a setting that there is not.
    """
    config = load_config(folder / "run.yaml", settings, leaves_out=say)
    return config.model_copy(update={"run_dir": folder.resolve().parent, "name": folder.resolve().name})


def recordable(config: RunConfig) -> RunConfig:
    """The config as run.yaml can hold it. A folder may have been renamed to what is no run's name, or moved to where a path would be filled in
    when it is read; who reads a run goes by where it lies."""
    try:
        reads = expanded(str(config.run_dir)) == str(config.run_dir) and str(config.run_dir).isprintable()
    except ValueError:
        reads = False
    changes: dict[str, object] = {} if reads else {"run_dir": Path("runs")}
    if not re.fullmatch(NAME, config.name):
        changes["name"] = "renamed"
    return config.model_copy(update=changes)
