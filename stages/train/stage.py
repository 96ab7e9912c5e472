"""Train: DPO on the curated pairs with TRL, resumable, ending in a merged model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from schemas.config.base import semantic_values
from schemas.errors import UserError
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Account, Context, Drop, Rows, tally
from stages.models.load import free_memory, load_causal_lm, settle_threads
from stages.text.render import load_renderer
from stages.train.batches import plan_batches
from stages.train.card import model_card
from stages.train.dataset import TrainingPairs, load_pairs
from stages.train.export import export_model
from stages.train.loggers import check_loggers, logs_in
from stages.train.model import Precision, precision
from stages.train.orthalign import train_objectives
from stages.train.phase import Phase, train_phase
from stages.train.references import checked_references

_SUMS = ("train_runtime", "total_flos")
_RATES = ("train_samples_per_second", "train_steps_per_second", "train_loss")


class Train:
    """curated -> metrics, model.

    ctx.folder holds checkpoints/, logs/, adapter/ (LoRA), model/ (merged safetensors, tokenizer, card). A run that was
    killed or stopped continues from its last complete checkpoint; on the CPU in float32 it then ends with the same
    weights bit for bit. Raises UserError for what the config or the data make impossible, Stopped when asked to stop.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Train, then yield the metrics and the account (unit: pair)."""
        folder = ctx.folder
        if folder is None:
            raise ValueError("train needs a folder")
        config, policy = ctx.config, ctx.models["policy"]
        check_loggers(config.train.report_to)
        numbers = precision(config)
        settle_threads(config)
        renderer = load_renderer(policy, config.text, config.model.trust_remote_code)
        pairs = load_pairs(ctx, renderer)
        sequence = bool(config.train.orthalign.objectives)
        plan = plan_batches(len(pairs), config.train, _devices())
        for line in (*renderer.notes, *(() if sequence else plan.notes)):
            ctx.progress.note(line)

        model = load_causal_lm(policy, numbers.load, numbers.device, config.model.trust_remote_code)
        pairs = _with_references(ctx, pairs, model, numbers)
        started, identity = time.monotonic(), _identity(ctx, pairs)
        drops: list[Drop] = []
        with logs_in(folder / "logs"):
            if sequence:
                trained, history, drops = train_objectives(ctx, folder, model, renderer, pairs, numbers, identity)
            else:
                phase = Phase(pairs, plan, folder / "checkpoints", identity)
                trained, history = train_phase(ctx, model, renderer, numbers, phase)
        del model
        files = export_model(trained, renderer.tokenizer, folder, policy.name, numbers.compute)
        tallies = tally("pair", pairs.languages, drops)
        trained_on = {t.language: t.kept for t in tallies}
        card = folder / "model" / "README.md"
        reference, steps = ctx.models["reference"].name, max(entry["step"] for entry in history)
        card.write_text(
            model_card(config, ctx.round, policy.name, reference, trained_on, plan, steps), encoding="utf-8"
        )
        yield Rows("metrics", metrics_table(history))
        yield Account(
            tallies=tallies,
            drops=drops,
            stats={"steps": float(steps), "seconds": time.monotonic() - started, **_summary(history)},
            artifacts=sorted({*files, card}),
        )
        del trained
        free_memory()


def metrics_table(history: list[dict[str, Any]]) -> pa.Table:
    """Every number TRL logged, by step and name, the same for a run that was resumed.

    The summary TRL logs at its end covers only the steps since the last resume: it goes to the account's stats.
    """
    rows = [
        {"step": entry["step"], "name": name, "value": float(value)}
        for entry in history
        if "train_runtime" not in entry
        for name, value in sorted(entry.items())
        if name != "step" and isinstance(value, (int, float))
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["metrics"].schema)


def _summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """What TRL says at the end of a training; of a sequence, seconds and operations are summed over its objectives, and the
    rest averaged by their seconds."""
    ends = [entry for entry in history if "train_runtime" in entry]
    found = {name: sum(float(end.get(name, 0.0)) for end in ends) for name in _SUMS}
    for name in _RATES:
        weighted = sum(float(end.get(name, 0.0)) * float(end["train_runtime"]) for end in ends)
        found[name] = weighted / found["train_runtime"] if found["train_runtime"] else math.nan
    return {name: value for name, value in found.items() if ends and math.isfinite(value)}


def _devices() -> int:
    """Devices that train together: one in this version."""
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if devices > 1:
        raise UserError(
            f"train was started on {devices} devices", where="train", fix="This version trains on one device."
        )
    return devices


def _with_references(ctx: Context, pairs: TrainingPairs, policy: PreTrainedModel, numbers: Precision) -> TrainingPairs:
    """Check the reference log-probabilities against the reference model, which is the policy itself in most runs."""
    ref = ctx.models["reference"]
    same = ref.digest == ctx.models["policy"].digest
    trust = ctx.config.model.trust_remote_code
    model = policy if same else load_causal_lm(ref, numbers.compute, numbers.device, trust)
    pairs, note = checked_references(pairs, model, numbers.compute, ctx.config.gradients.token_budget)
    if note:
        ctx.progress.note(note)
    return pairs


def _identity(ctx: Context, pairs: TrainingPairs) -> str:
    """What the weights depend on: a checkpoint of another identity is never resumed from."""
    config = ctx.config
    sections = [semantic_values(s) for s in (config.train, config.loss, config.text, config.model, config.execution)]
    models = [ctx.models[role].digest for role in ("policy", "reference", "sft", "base") if role in ctx.models]
    return content_id(sections, config.seed, ctx.round, models, pairs.digest)
