"""Sft: the policy of round 0, made from `model.policy` by supervised fine-tuning on conversations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from schemas.config.base import semantic_values
from schemas.ids import content_id
from stages.contract import Account, ArtifactStage, Context, Rows, tally
from stages.models.device import free_memory
from stages.sft.card import sft_card
from stages.sft.conversations import Conversations, load_conversations
from stages.sft.trainer import data_seed, fine_tune
from stages.train.batches import plan_batches
from stages.train.export import exported, save_trained, write_cards
from stages.train.loggers import check_loggers, logs_in
from stages.train.memory import memory_named
from stages.train.metrics import metrics_table
from stages.train.seen import Seen, rows_seen
from stages.train.session import Session


class Sft(ArtifactStage):
    """sft.sources -> conversations, sft_metrics, model.

    Unit row; drops as in `load_conversations`. ctx.folder holds checkpoints/, logs/, adapter/ (LoRA), model/ (merged safetensors,
    tokenizer with the chat template that was used, card). Resumes as the train stage does. Raises UserError for what the
    config or the data make impossible, Stopped when asked to stop.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Read, train, then yield both tables and the account."""
        sft = ctx.config.sft
        check_loggers(sft)
        with memory_named(sft.section):
            yield from _run(Session.of(ctx, sft, ctx.models["start"]))


def _run(session: Session) -> Iterator[Rows | Account]:
    config, sft = session.config, session.config.sft
    conversations = load_conversations(session.ctx, session.renderer)
    plan = plan_batches(len(conversations), sft)
    for line in (*session.renderer.notes, *session.renderer.notes_on_learning, *plan.notes, *_notes(conversations)):
        session.note(line)

    model = session.load()
    started, session = time.monotonic(), replace(session, identity=_identity(session.ctx, conversations))
    with logs_in(session.folder / "logs"):
        trained, history = fine_tune(session, model, conversations, plan)
    del model
    save_trained(session, sft, trained)
    tallies = tally("row", conversations.languages, conversations.drops)
    seen = rows_seen(len(conversations), plan, sft.batch_size, data_seed(session))
    learnt = Seen.of(conversations.table["language"].to_pylist(), seen)
    write_cards(session.folder, sft_card(config, session.start, learnt, plan))
    yield Rows("conversations", conversations.table)
    yield Rows("sft_metrics", metrics_table(history))
    stats = {
        "steps": float(plan.steps),
        "rows_seen": float(learnt.count),
        "seconds": time.monotonic() - started,
        "tokens": float(sum(conversations.table["n_tokens"].to_pylist())),
        "learnt_tokens": float(sum(conversations.table["n_learnt"].to_pylist())),
        "answers_context_only": float(conversations.answers["context_only"]),
        "control_marks_broken": float(conversations.broken_marks),
    }
    yield Account(tallies, conversations.drops, stats, exported(session.folder))
    del trained
    free_memory()


def _notes(conversations: Conversations) -> list[str]:
    answers, notes = conversations.answers, []
    if context := answers["context_only"]:
        notes.append(
            f"{context} of {answers.total()} answers are context only: the chat template renders them differently once the"
            " conversation goes on"
        )
    if left_out := answers["left_out"]:
        notes.append(
            f"{left_out} of {answers.total()} answers are not learnt, for the data says so (weight 0, train: false, ...)"
        )
    if conversations.in_turn:
        notes.append(
            f"{conversations.in_turn} conversations are lists of texts: read as the user's and the assistant's in turn"
        )
    if conversations.in_a_row:
        notes.append(
            f"{conversations.in_a_row} conversations have an answer right after another, and both are learnt: where they are answers to one "
            "turn, keep one in the data"
        )
    return notes


def _identity(ctx: Context, conversations: Conversations) -> str:
    """What the weights depend on: a checkpoint of another identity is never resumed from."""
    config = ctx.config
    sections = [semantic_values(section) for section in (config.sft, config.text, config.model, config.execution)]
    return content_id("sft", sections, config.seed, ctx.models["start"].digest, conversations.digest)
