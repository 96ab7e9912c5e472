"""Hashes of the files a config points to: their content is part of the fingerprint of the stages that read them."""

from __future__ import annotations

from pathlib import Path

from schemas.config import RunConfig
from schemas.config.sources import Source
from schemas.errors import UserError
from schemas.files import sha256
from stages.spec import StageSpec


def config_files(spec: StageSpec, config: RunConfig) -> dict[str, str]:
    """name -> SHA-256 of every local file the stage reads outside the run directory."""
    found: dict[str, str] = {}
    for source in spec.sources_of(config):
        found.update(_source(source, config))
    if any(section.startswith("judge") for section in spec.sections):
        found.update(_rubrics(config))
    if "text" in spec.sections and config.text.chat_template:
        path = Path(config.text.chat_template)
        if not path.is_file():
            raise UserError("There is no such chat template", where=f"text.chat_template: {path}")
        found[path.name] = sha256(path)
    return found


def _source(source: Source, config: RunConfig) -> dict[str, str]:
    from stages.sources import local_files

    languages = [*config.languages.seen, *config.languages.unseen]
    return {file.name: sha256(file.path) for file in local_files(source, languages)}


def _rubrics(config: RunConfig) -> dict[str, str]:
    from stages.judge.rubric import rubric_path

    found = {}
    for language in [*config.languages.seen, *config.languages.unseen]:
        path = rubric_path(config.judge.rubric, language)
        found[f"rubric {language}"] = sha256(path)
    return found
