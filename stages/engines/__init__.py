"""Inference engines behind one interface: vLLM, transformers, OpenAI-compatible servers."""

from __future__ import annotations

from stages.contract import Context
from stages.engines.base import Engine
from stages.text.render import load_renderer

_ENGINE, _KEY = "engine", "engine key"


def shared_engine(ctx: Context, role: str) -> Engine:
    """The engine for the model in `role`, loaded once per worker process and kept in ctx.shared.

    Another model, dtype, context or text setting closes the engine that is loaded before its own is.
    Raises UserError when the engine's package is missing or the model cannot be loaded.
    """
    config, model = ctx.config, ctx.models[role]
    key = repr((model.digest, model.path, config.engine, config.model.dtype, config.text, config.execution))
    if ctx.shared.get(_KEY) == key:
        engine: Engine = ctx.shared[_ENGINE]
        return engine
    if _ENGINE in ctx.shared:
        ctx.shared.pop(_KEY)
        ctx.shared.pop(_ENGINE).close()
    renderer = load_renderer(model, config.text, config.model.trust_remote_code)
    for note in renderer.notes:
        ctx.progress.note(f"{model.name}: {note}")
    match config.engine.kind:
        case "vllm":
            from stages.engines.process import ProcessEngine
            from stages.engines.vllm import load

            engine = ProcessEngine(load, ctx, model, renderer)
        case "transformers":
            from stages.engines.transformers import TransformersEngine

            engine = TransformersEngine(model, config, renderer, ctx)
        case "openai":
            from stages.engines.openai import OpenAIEngine

            engine = OpenAIEngine(model, config, renderer)
    ctx.shared[_ENGINE], ctx.shared[_KEY] = engine, key
    return engine
