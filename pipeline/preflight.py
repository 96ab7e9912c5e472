"""Checks before hours are spent: the files the config points to, the packages the stages need, the models they read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec

from pipeline.config_digests import config_files
from pipeline.executors import EXECUTORS
from pipeline.local_gpus import local_gpus, width
from pipeline.models import Models
from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError
from stages.schedule import Step
from stages.source_kinds import batches_of
from stages.sources import Batch, is_hub, names_splits
from stages.spec import Needs, StageSpec, config_value
from stages.train.batches import check_batches

_FILES = 20
"""Files of one source that are looked into before any work: the first batch of each."""


def preflight(config: RunConfig, specs: Iterable[StageSpec]) -> None:
    """Raise UserError for a missing file or package of any of the stages, and for batches that cannot be cut as they are to be."""
    if (needed := EXECUTORS[config.execution.on].needs) is not None:
        _check(needed)
    for spec in specs:
        config_files(spec, config)
        for needs in spec.needs:
            _check(needs(config), spec.name)
        if spec.trains and (devices := _together(config, spec)):
            check_batches(config_value(config, spec.name), devices)


def look_at_sources(config: RunConfig, specs: Iterable[StageSpec]) -> list[Iterator[Batch]]:
    """The local sources of the stages, opened. Raises UserError as the stages would for files that are missing, broken from the start or
    without the columns that are read; those of the hub are not asked for. And for a dev split that is needed and will have no rows."""
    check_splits(config)
    sources = [source for spec in {spec.name: spec for spec in specs}.values() for source in spec.sources_of(config)]
    return [batches_of(source, config.languages.codes, _FILES) for source in sources if not is_hub(source)]


def check_splits(config: RunConfig) -> None:
    """Raise UserError where the dev split is needed and the sources leave it empty, or mix what is checked with what is not."""
    try:
        config.check_dev(names_splits)
    except ValueError as error:
        raise UserError(str(error), where="pairs.sources" if config.imported else "prompts.sources") from error


def notes_on(opened: Iterable[Iterator[Batch]]) -> list[str]:
    """What the stages would say of how sources are read, as far as their first rows tell."""
    firsts = [batch for batches in opened if (batch := next(batches, None)) is not None]
    return [f"{batch.source}: {note}" for batch in firsts for note in batch.notes]


def _together(config: RunConfig, spec: StageSpec) -> int:
    """Processes that will train together; 0: that is seen when they start."""
    if not spec.machines:
        return 1
    local = config.execution.on == "local"
    processes = width(config, spec, local_gpus(config)) if local else config_value(config, spec.gpus)
    return processes * int(config_value(config, spec.machines))


def _check(needed: Needs, stage: str = "") -> None:
    """Raise UserError for a package that is not there."""
    missing = [package for package in needed.packages if find_spec(package) is None]
    if missing:
        names = ", ".join(missing)
        what = needed.what.format(names) if needed.what else f"Stage {stage} needs the packages {names}"
        raise UserError(what, where=needed.where, fix=needed.fix)


def look_at_models(config: RunConfig, models: Models, steps: Iterable[Step]) -> list[str]:
    """What there is to say of the models that steps read, looked at without their weights. Raises UserError for chat templates
    without bounds, for files that do not fit their architecture, for a policy whose gradients cannot be sketched, and for layers that training as the config says needs or cannot have."""
    if not all(map(find_spec, ("torch", "transformers"))):
        return []
    steps = list(steps)
    found = [(model, sketched) for model, sketched in models.outside(steps).items() if model.path is not None]
    notes = []
    if rendered := models.rendered(steps):
        from stages.checks.template import check_template

        for model in rendered:
            check_template(model, config.text, config.model.trust_remote_code)
    if found:
        from stages.checks.architecture import look  # imports torch

        notes = [note for model, sketched in found if (note := look(model, config, sketched).note)]
    notes += _look_at_layers(config, models, steps)
    _look_at_reference(config, models, steps)
    return notes + [
        note
        for look in dict.fromkeys(look for step in steps for look in step.spec.looks)
        for note in _call(look, config)
    ]


def _call(look: str, config: RunConfig) -> list[str]:
    module, _, function = look.partition(":")
    return list(getattr(import_module(module), function)(config))


def _look_at_layers(config: RunConfig, models: Models, steps: Iterable[Step]) -> list[str]:
    """What there is to say of the layers that are trained. Raises UserError for those that training as the config says needs or cannot
    have: every model the run trains has the layers of its first."""
    notes = []
    for name in {step.spec.name for step in steps if step.spec.trains}:
        section: TrainerConfig = config_value(config, name)
        if models.start().path is not None and find_spec("peft"):
            from stages.checks.layers import check_layers

            notes += check_layers(models.start(), config, section)
    return notes


def _look_at_reference(config: RunConfig, models: Models, steps: Iterable[Step]) -> None:
    """Raise UserError for a `model.reference` that reads other tokens than the policy."""
    reads = next((step for step in steps if "reference" in step.spec.roles(config)), None)
    if config.model.reference is None or reads is None:
        return
    from stages.checks.reference import check_reference

    check_reference(models.start(), models.reference(), config)
