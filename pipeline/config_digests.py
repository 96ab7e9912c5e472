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
    if "judge" in spec.sections:
        found.update(_judges(config))
    if "judge.rubric" in spec.sections:
        found.update(_rubrics(config.judge.rubric, config))
    if "evaluate" in spec.sections and config.evaluate.benchmarks.folder:
        from stages.evaluate.benchmarks.wanted import folder_files, wanted_of

        folder = wanted_of(config).folder
        assert folder is not None
        found.update({f"task {name}": digest for name, digest in folder_files(folder).items()})
    if "text" in spec.sections and config.text.chat_template:
        path = Path(config.text.chat_template)
        if not path.is_file():
            raise UserError("There is no such chat template", where=f"text.chat_template: {path}")
        found[path.name] = sha256(path)
    return found


def _source(source: Source, config: RunConfig) -> dict[str, str]:
    from stages.sources import local_files

    languages = config.languages.codes
    return {file.name: sha256(file.path) for file in local_files(source, languages)}


def _judges(config: RunConfig) -> dict[str, str]:
    """Rubrics and chat templates of every judge."""
    found = {}
    for judge in config.judge.judges:
        settings, at = judge.settings, "" if judge.key == "/" else f" of {judge.key.strip('/')}"
        if settings.facts.rubric:
            found.update({f"{name}{at}": digest for name, digest in _rubrics(settings.rubric, config).items()})
        if settings.chat_template:
            path = Path(settings.chat_template)
            if not path.is_file():
                raise UserError("There is no such chat template", where=f"{judge.where}.chat_template: {path}")
            found[f"chat template{at}"] = sha256(path)
    return found


def _rubrics(template: str, config: RunConfig) -> dict[str, str]:
    from stages.judge.rubric import rubric_path

    found = {}
    for language in config.languages.codes:
        found[f"rubric {language}"] = sha256(rubric_path(template, language))
    return found
