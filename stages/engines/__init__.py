"""Inference engines behind one interface: `schemas.engines` says what is true of each, its modules load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module

from schemas.config.model import EngineConfig, TextConfig
from schemas.engines import Task
from stages.contract import Context
from stages.engines.base import Engine, Load
from stages.text.render import load_renderer

_ENGINES = "engines"


@dataclass(frozen=True)
class Wanted:
    """An engine that a stage needs: of the model in `role`, for a task. engine, text: other settings than the run's."""

    role: str
    task: Task = "text"
    engine: EngineConfig | None = None
    text: TextConfig | None = None


def shared_engine(ctx: Context, role: str) -> Engine:
    """The run's engine of the model in `role`; see `shared_engines`."""
    return shared_engines(ctx, [Wanted(role)])[0]


def shared_engines(ctx: Context, wanted: Sequence[Wanted]) -> list[Engine]:
    """The engines in the order asked for, each loaded once per worker process and kept in ctx.shared; equal ones are one.

    Those that are loaded and not wanted are closed before others are loaded.
    Raises UserError when an engine's package is missing or a model cannot be loaded.
    """
    loaded: dict[str, Engine] = ctx.shared.setdefault(_ENGINES, {})
    keys = [_key(ctx, one) for one in wanted]
    for key in [key for key in loaded if key not in keys]:
        loaded.pop(key).close()
    for key, one in zip(keys, wanted, strict=True):
        if key not in loaded:
            loaded[key] = _load(ctx, one)
    return [loaded[key] for key in keys]


def close_engines(ctx: Context) -> None:
    """Close all engines of this worker process."""
    shared_engines(ctx, [])


def _key(ctx: Context, wanted: Wanted) -> str:
    config, model = ctx.config, ctx.models[wanted.role]
    settings = wanted.engine or config.engine, config.model.dtype, wanted.text or config.text, config.execution
    return repr((wanted.task, model.digest, model.path, settings))


def _load(ctx: Context, wanted: Wanted) -> Engine:
    model, config = ctx.models[wanted.role], ctx.config
    own = {"engine": wanted.engine or config.engine, "text": wanted.text or config.text}
    if wanted.engine is not None:  # an engine of its own serves its own model
        own["model"] = config.model.model_copy(update={"policy": model.name})
    ctx = replace(ctx, config=config.model_copy(update=own))
    facts = ctx.config.engine.facts
    module, _, function = facts.loads[wanted.task].partition(":")
    load: Load = getattr(import_module(f"{__name__}.{module}"), function)
    if facts.own_process:
        from stages.engines.process import ProcessEngine

        renderer = load_renderer(model, ctx.config.text, config.model.trust_remote_code)
        engine: Engine = ProcessEngine(load, ctx, model, renderer)
    else:
        engine = load(model, ctx.config, ctx)
    for note in engine.renderer.notes:
        ctx.progress.note(f"{model.name}: {note}")
    return engine
