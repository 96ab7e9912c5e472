"""What each process of a training does: from the curated pairs to the model on disk. One process does all of it alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from schemas.config.base import semantic_values
from schemas.ids import content_id
from stages.contract import Context, Drop
from stages.models.load import free_memory, load_causal_lm, settle_threads
from stages.text.render import load_renderer
from stages.train.allo.phases import train_objective
from stages.train.batches import BatchPlan, plan_batches
from stages.train.dataset import TrainingPairs, load_pairs
from stages.train.export import export_model
from stages.train.loggers import logs_in
from stages.train.model import Precision, precision
from stages.train.orthalign import train_objectives
from stages.train.phase import Phase
from stages.train.processes import count, from_first, is_first
from stages.train.references import checked_references
from stages.train.scoring import Scorer


@dataclass(frozen=True)
class Outcome:
    """history: TRL's log. drops: pairs that belong to no objective. languages: of every curated pair. The model is on disk."""

    history: list[dict[str, Any]]
    drops: list[Drop]
    languages: list[str]
    plan: BatchPlan


def train_job(ctx: Context) -> Outcome:
    """Train and export. Raises UserError for what the config or the data make impossible, Stopped when asked to stop."""
    folder = ctx.folder
    if folder is None:
        raise ValueError("train needs a folder")
    config, policy = ctx.config, ctx.models["policy"]
    numbers = precision(config)
    settle_threads(config, count())
    renderer = load_renderer(policy, config.text, config.model.trust_remote_code)
    pairs = load_pairs(ctx, renderer)
    sequence = bool(config.train.orthalign.objectives)
    plan = plan_batches(len(pairs), config.train, count())
    for line in (*renderer.notes, *(() if sequence else plan.notes)):
        ctx.progress.note(line)

    model = load_causal_lm(policy, numbers.load, numbers.placed, config.model.trust_remote_code)
    pairs = from_first(partial(_with_references, ctx, pairs, model, numbers))
    identity = _identity(ctx, pairs)
    drops: list[Drop] = []
    with logs_in(folder / "logs"):
        if sequence:
            trained, history, drops = train_objectives(ctx, folder, model, renderer, pairs, numbers, identity)
        else:
            phase = Phase(pairs, plan, folder / "checkpoints", identity)
            trained, history = train_objective(ctx, model, renderer, numbers, phase)
    del model
    if is_first():
        export_model(trained, renderer.tokenizer, folder, policy.name, numbers.compute)
    del trained
    free_memory()
    return Outcome(history, drops, pairs.languages, plan)


def _with_references(ctx: Context, pairs: TrainingPairs, policy: PreTrainedModel, numbers: Precision) -> TrainingPairs:
    """Check the reference log-probabilities against the reference model, which is the policy itself in most runs."""
    ref = ctx.models["reference"]
    same = ref.digest == ctx.models["policy"].digest and numbers.placed == numbers.device
    trust = ctx.config.model.trust_remote_code
    load = numbers.compute if numbers.sharded else numbers.load  # a model to be cut may not fit a device in float32
    model = policy if same else load_causal_lm(ref, load, numbers.device, trust)
    return checked_references(pairs, model, Scorer.of(ctx, numbers), ctx.progress.note)


def _identity(ctx: Context, pairs: TrainingPairs) -> str:
    """What the weights depend on: a checkpoint of another identity is never resumed from."""
    config = ctx.config
    sections = [semantic_values(s) for s in (config.train, config.loss, config.text, config.model, config.execution)]
    models = [
        ctx.models[role].digest for role in ("policy", "reference", "sft", "base", "token_reward") if role in ctx.models
    ]
    return content_id(sections, config.seed, ctx.round, models, pairs.digest)
