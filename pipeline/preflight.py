"""Checks before hours are spent: the files the config points to, and the packages the stages need."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from pipeline.config_digests import config_files
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.spec import StageSpec


def preflight(config: RunConfig, specs: Iterable[StageSpec]) -> None:
    """Raise UserError for a missing file or package of any of the stages."""
    for spec in specs:
        config_files(spec, config)
        for need in (needs(config) for needs in spec.needs):
            missing = [package for package in need.packages if find_spec(package) is None]
            if missing:
                names = ", ".join(missing)
                what = need.what.format(names) if need.what else f"Stage {spec.name} needs the packages {names}"
                raise UserError(what, where=need.where, fix=need.fix)
