"""Sft: the policy of round 0, made from `model.policy` by supervised fine-tuning on conversations."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from schemas.config.base import semantic_values
from schemas.config.sft import SftConfig
from schemas.config.training import TrainConfig
from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import Account, ArtifactStage, Context, Rows, tally
from stages.models.load import free_memory, load_causal_lm, settle_threads
from stages.sft.card import sft_card
from stages.sft.conversations import Conversations, load_conversations
from stages.sft.trainer import fine_tune
from stages.text.render import load_renderer
from stages.train.batches import plan_batches
from stages.train.export import export_model, exported
from stages.train.loggers import check_loggers, logs_in
from stages.train.memory import memory_named
from stages.train.model import precision
from stages.train.stage import metrics_table

_TRAIN = re.compile(rf"\btrain(?=\.(?:{'|'.join(SftConfig.model_fields)})\b)|^train$")


class Sft(ArtifactStage):
    """sft.sources -> conversations, sft_metrics, model.

    Unit row; drops as in `load_conversations`. ctx.folder holds checkpoints/, logs/, adapter/ (LoRA), model/ (merged safetensors,
    tokenizer with the chat template that was used, card). Resumes as the train stage does. Raises UserError for what the
    config or the data make impossible, Stopped when asked to stop.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Read, train, then yield both tables and the account."""
        with _in_our_names():
            yield from _run(ctx)


def _run(ctx: Context) -> Iterator[Rows | Account]:
    folder = ctx.folder
    if folder is None:
        raise ValueError("sft needs a folder")
    config, sft, start = ctx.config, ctx.config.sft, ctx.models["start"]
    check_loggers(sft.report_to)
    numbers = precision(config)
    numbers = replace(numbers, load=torch.float32 if sft.method == "full" else numbers.compute)
    settle_threads(config)
    renderer = load_renderer(start, config.text, config.model.trust_remote_code)
    conversations = load_conversations(ctx, renderer)
    plan = plan_batches(len(conversations), _as_pairs(sft))
    for line in (*renderer.notes, *map(_ours, plan.notes), *_notes(conversations)):
        ctx.progress.note(line)

    model = load_causal_lm(start, numbers.load, numbers.device, config.model.trust_remote_code)
    started, identity = time.monotonic(), _identity(ctx, conversations)
    with logs_in(folder / "logs"):
        trained, history = fine_tune(ctx, folder, model, renderer, conversations, plan, numbers, identity)
    del model
    export_model(trained, renderer.tokenizer, folder, start.name, numbers.compute)
    tallies = tally("row", conversations.languages, conversations.drops)
    learnt = {entry.language: entry.kept for entry in tallies if entry.kept}
    (folder / "model" / "README.md").write_text(sft_card(config, start.name, learnt, plan), encoding="utf-8")
    yield Rows("conversations", conversations.table)
    yield Rows("sft_metrics", metrics_table(history))
    stats = {
        "steps": float(plan.steps),
        "seconds": time.monotonic() - started,
        "tokens": float(sum(conversations.table["n_tokens"].to_pylist())),
        "learnt_tokens": float(sum(conversations.table["n_learnt"].to_pylist())),
        "answers_context_only": float(conversations.answers["context_only"]),
        "control_marks_broken": float(conversations.broken_marks),
    }
    yield Account(tallies, conversations.drops, stats, exported(folder))
    del trained
    free_memory()


def _as_pairs(sft: SftConfig) -> TrainConfig:
    """The settings by which steps are counted, where the train stage has them."""
    names = ("batch_size", "micro_batch_size", "epochs", "max_steps", "warmup_ratio")
    return TrainConfig.model_validate({name: getattr(sft, name) for name in names})


@contextmanager
def _in_our_names() -> Iterator[None]:
    """What parts of the train stage refuse, with the keys of this section."""
    try:
        with memory_named():
            yield
    except UserError as error:
        raise UserError(_ours(error.what), where=_ours(error.where), fix=_ours(error.fix)) from error


def _ours(text: str) -> str:
    return _TRAIN.sub("sft", text).replace("curated pairs", "conversations")


def _notes(conversations: Conversations) -> list[str]:
    context = conversations.answers["context_only"]
    if not context:
        return []
    return [
        f"{context} of {conversations.answers.total()} answers are context only: the chat template renders them differently"
        " once the conversation goes on"
    ]


def _identity(ctx: Context, conversations: Conversations) -> str:
    """What the weights depend on: a checkpoint of another identity is never resumed from."""
    config = ctx.config
    sections = [semantic_values(section) for section in (config.sft, config.text, config.model, config.execution)]
    return content_id("sft", sections, config.seed, ctx.models["start"].digest, conversations.digest)
