"""What each process of a training does: from the curated pairs to the model on disk. One process does all of it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from schemas.config.base import semantic_values
from schemas.ids import content_id
from stages.contract import Context, Drop
from stages.models.device import free_memory
from stages.models.load import load_causal_lm
from stages.train.batches import BatchPlan, plan_last
from stages.train.dataset import TrainingPairs, load_pairs
from stages.train.export import save_trained
from stages.train.loggers import logs_in
from stages.train.phase import History, Phase, pairs_seen, train_phase
from stages.train.processes import from_first, is_first, world_size
from stages.train.references import checked_references
from stages.train.seen import Seen
from stages.train.session import Session


@dataclass(frozen=True)
class Outcome:
    """history: TRL's log. drops: pairs that belong to no objective. languages: of every curated pair; seen: those learnt from. The model
    is on disk."""

    history: list[dict[str, Any]]
    drops: list[Drop]
    languages: list[str]
    seen: Seen
    plan: BatchPlan


def train_job(ctx: Context) -> Outcome:
    """Train and export. Raises UserError for what the config or the data make impossible, Stopped when asked to stop."""
    train = ctx.config.train
    session = Session.of(ctx, train, ctx.models["policy"])
    pairs = load_pairs(ctx, session.renderer)
    plan = plan_last(len(pairs), train, world_size())
    for line in (
        *session.renderer.notes,
        *session.renderer.notes_on_learning,
        *(() if train.way == "sequence" else plan.notes),
    ):
        session.note(line)

    model = session.load()
    pairs = from_first(partial(_with_references, session, pairs, model), ctx.config)
    session = replace(session, identity=_identity(ctx, pairs))
    with logs_in(session.folder / "logs"):
        trained, history, drops, seen = _train(session, model, pairs, plan)
    del model
    if is_first():
        save_trained(session, train, trained)
    del trained
    free_memory()
    return Outcome(history, drops, pairs.languages, Seen.of(pairs.languages, seen), plan)


def _train(
    session: Session, model: PreTrainedModel, pairs: TrainingPairs, plan: BatchPlan
) -> tuple[Any, History, list[Drop], set[int]]:
    """(the trained model, the log, pairs that belong to no objective, positions of the pairs learnt from). What only some trainings
    need is imported for them."""
    train, common = session.train, (pairs, plan, session.checkpoints, session.identity)
    if train.way == "sequence":
        from stages.train.orthalign import train_objectives

        return train_objectives(session, model, pairs)
    if train.way == "phases":
        from stages.train.allo.phases import pairs_seen_in_phases, train_in_phases
        from stages.train.confined import ConfinedPhase

        last = ConfinedPhase(*common)
        return *train_in_phases(session, model, last), [], pairs_seen_in_phases(session, last)
    phase = Phase(*common)
    if train.language_surgery != "none":
        from stages.train.language_surgery import LanguageSurgeryPhase, with_languages

        if len(set(pairs.languages)) == 1:
            session.note(f"all pairs are {pairs.languages[0]}: train.language_surgery has nothing to resolve")
        phase = LanguageSurgeryPhase(with_languages(pairs), plan, session.checkpoints, session.identity)
    if train.merges:
        from stages.train.confined import ConfinedPhase

        phase = ConfinedPhase(*common)
    return *train_phase(session, model, phase), [], pairs_seen(session, phase)


def _with_references(session: Session, pairs: TrainingPairs, policy: PreTrainedModel) -> TrainingPairs:
    """Check the reference log-probabilities against the reference model, which is the policy itself in most runs; zeros, and no
    forward, for a loss without one."""
    if session.config.loss.reference_free:
        return pairs.with_references([(0.0, 0.0)] * len(pairs))
    ref, numbers = session.ctx.models["reference"], session.numbers
    same = ref.digest == session.start.digest and not numbers.sharded
    trust = session.config.model.trust_remote_code
    load = numbers.compute if numbers.sharded else numbers.load  # a model to be cut may not fit a device in float32
    model = policy if same else load_causal_lm(ref, load, numbers.device, trust)
    return checked_references(pairs, model, session.scorer(), session.note)


def _identity(ctx: Context, pairs: TrainingPairs) -> str:
    """What the weights depend on: a checkpoint of another identity is never resumed from."""
    config = ctx.config
    sections = [semantic_values(s) for s in (config.train, config.loss, config.text, config.model, config.execution)]
    models = [
        ctx.models[role].digest for role in ("policy", "reference", "sft", "base", "token_reward") if role in ctx.models
    ]
    return content_id(sections, config.seed, ctx.round, models, pairs.digest)
