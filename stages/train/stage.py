"""Train: DPO on the curated pairs with TRL, resumable, ending in a merged model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel, PrinterCallback, set_seed
from trl import DPOConfig

from schemas.config.base import semantic_values
from schemas.errors import UserError
from schemas.ids import content_id, seed_for
from schemas.tables import TABLES
from stages.contract import Account, Context, Rows, Stopped, tally
from stages.models.load import free_memory, load_causal_lm, settle_threads
from stages.text.render import Renderer, load_renderer
from stages.train.batches import BatchPlan, plan_batches
from stages.train.callbacks import StepCallback
from stages.train.card import model_card
from stages.train.checkpoints import resumable
from stages.train.dataset import TrainingPairs, load_pairs
from stages.train.export import export_model
from stages.train.loggers import check_loggers, logs_in
from stages.train.model import Precision, adapter_config, disable_dropout, precision
from stages.train.references import checked_references
from stages.train.trainer import PairTrainer
from stages.train.vector import task_vector_for

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_OF_THE_CALL = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")


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
        plan = plan_batches(len(pairs), config.train, _devices())
        for line in (*renderer.notes, *plan.notes):
            ctx.progress.note(line)

        model = load_causal_lm(policy, numbers.load, numbers.device, config.model.trust_remote_code)
        pairs = _with_references(ctx, pairs, model, numbers)
        started = time.monotonic()
        with logs_in(folder / "logs"):
            trainer, steps = _trainer(ctx, folder, model, renderer, pairs, plan, numbers)
            checkpoint = resumable(folder / "checkpoints", trainer.identity, ctx.progress.note)
            if checkpoint is not None:
                ctx.progress.note(f"resuming from {checkpoint.name}")
            if ctx.stop():
                raise Stopped
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if steps.stopped:
            raise Stopped
        history = trainer.state.log_history
        trained: Any = trainer.model
        del trainer, model
        files = export_model(trained, renderer.tokenizer, folder, policy.name, numbers.compute)
        card = folder / "model" / "README.md"
        reference = ctx.models["reference"].name
        card.write_text(
            model_card(config, ctx.round, policy.name, reference, pairs.per_language, plan), encoding="utf-8"
        )
        yield Rows("metrics", metrics_table(history))
        yield Account(
            tallies=tally("pair", pairs.languages, []),
            stats={"steps": float(plan.steps), "seconds": time.monotonic() - started, **_summary(history)},
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
    last = history[-1] if history else {}
    return {name: float(last[name]) for name in _OF_THE_CALL if name in last and math.isfinite(last[name])}


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


def _trainer(
    ctx: Context,
    folder: Path,
    model: PreTrainedModel,
    renderer: Renderer,
    pairs: TrainingPairs,
    plan: BatchPlan,
    numbers: Precision,
) -> tuple[PairTrainer, StepCallback]:
    config = ctx.config
    seed = seed_for(config.seed, ctx.round, "train") % 2**32
    set_seed(seed)  # the adapter's first weights
    disable_dropout(model)
    callback = StepCallback(ctx.progress, ctx.stop, len(pairs))
    trainer = PairTrainer(
        model=model,
        args=_arguments(ctx, folder, plan, numbers, seed),
        train_dataset=pairs.dataset(),
        processing_class=renderer.tokenizer,
        peft_config=adapter_config(config.train.lora, model) if config.train.method == "lora" else None,
        callbacks=[callback],
        train_config=config.train,
        identity=_identity(ctx, pairs),
        task_vector=task_vector_for(ctx, model),
        alpha=config.loss.alpha,
    )
    trainer.remove_callback(PrinterCallback)
    kept = trainer.num_examples(trainer.get_train_dataloader())
    if kept != len(pairs):
        raise UserError(
            f"TRL kept {kept} of {len(pairs)} curated pairs",
            where="train",
            fix="This is a change in TRL: use the pinned version.",
        )
    return trainer, callback


def _identity(ctx: Context, pairs: TrainingPairs) -> str:
    """What the weights depend on: a checkpoint of another identity is never resumed from."""
    config = ctx.config
    sections = [semantic_values(s) for s in (config.train, config.loss, config.text, config.model, config.execution)]
    models = [ctx.models[role].digest for role in ("policy", "reference", "sft", "base") if role in ctx.models]
    return content_id(sections, config.seed, ctx.round, models, pairs.digest)


def _arguments(ctx: Context, folder: Path, plan: BatchPlan, numbers: Precision, seed: int) -> DPOConfig:
    train = ctx.config.train
    arguments = DPOConfig(
        output_dir=str(folder / "checkpoints"),
        run_name=f"{ctx.config.name}-round-{ctx.round}",
        project=ctx.config.name,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        warmup_steps=plan.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        beta=ctx.config.loss.beta,
        max_length=None,
        precompute_ref_log_probs=True,
        disable_dropout=False,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        bf16=numbers.bf16,
        fp16=numbers.fp16,
        use_cpu=numbers.device.type == "cpu",
        dataloader_pin_memory=numbers.device.type == "cuda",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=train.report_to or "none",
        save_strategy="steps",
        save_steps=train.save_steps,
        save_total_limit=2,
    )
    # One device trains, whatever else is visible (tensor-parallel inference): no nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
