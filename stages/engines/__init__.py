"""Inference engines behind one interface: `schemas.engines` says what is true of each, its module loads it."""

from __future__ import annotations

from importlib import import_module

from stages.contract import Context
from stages.engines.base import Engine, Load
from stages.text.render import load_renderer

_ENGINE, _KEY = "engine", "engine key"


def shared_engine(ctx: Context, role: str) -> Engine:
    """The engine for the model in `role`, loaded once per worker process and kept in ctx.shared.

    Another model, dtype, context or text setting closes the engine that is loaded before its own is.
    Raises UserError when the engine's package is missing or the model cannot be loaded.
    """
    config, model = ctx.config, ctx.models[role]
    key = repr((model.digest, model.path, config.engine, config.model.dtype, config.text, config.execution))
    engine: Engine
    if ctx.shared.get(_KEY) == key:
        engine = ctx.shared[_ENGINE]
        return engine
    if _ENGINE in ctx.shared:
        ctx.shared.pop(_KEY)
        ctx.shared.pop(_ENGINE).close()
    load: Load = import_module(f"{__name__}.{config.engine.kind}").load
    if config.engine.facts.own_process:
        from stages.engines.process import ProcessEngine

        renderer = load_renderer(model, config.text, config.model.trust_remote_code)
        engine = ProcessEngine(load, ctx, model, renderer)
    else:
        engine = load(model, config, ctx)
    for note in engine.renderer.notes:
        ctx.progress.note(f"{model.name}: {note}")
    ctx.shared[_ENGINE], ctx.shared[_KEY] = engine, key
    return engine
