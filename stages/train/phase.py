"""One training phase: TRL's trainer on some pairs, from the weights as they are, resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, set_seed
from trl import DPOConfig

from schemas.ids import seed_for
from stages.contract import Context
from stages.text.render import Renderer
from stages.train.arguments import common_arguments
from stages.train.batches import BatchPlan
from stages.train.callbacks import StepCallback
from stages.train.dataset import TrainingPairs
from stages.train.model import Precision, adapter_config, disable_dropout, protect_adapter
from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.subspace import Protected
from stages.train.resumable import train_all
from stages.train.trainer import PairTrainer
from stages.train.vector import task_vector_for

History = list[dict[str, Any]]
"""TRL's log."""


@dataclass(frozen=True)
class Phase:
    """What a phase trains on and how. identity: what its weights depend on; later: optimizer steps of the phases after it.

    checkpoints: folder of its checkpoints. protected: subspaces no update enters. active: entries that are trained. trainer: makes the
    trainer, a `PairTrainer`.
    """

    pairs: TrainingPairs
    plan: BatchPlan
    checkpoints: Path
    identity: str
    number: int = 0
    later: int = 0
    protected: Protected = field(default_factory=Protected.none)
    active: ActiveEntries = field(default_factory=lambda: ActiveEntries({}))
    trainer: Callable[..., PairTrainer] = PairTrainer


def train_phase(
    ctx: Context, model: PreTrainedModel, renderer: Renderer, numbers: Precision, phase: Phase
) -> tuple[Any, History]:
    """(the model trained, with its adapter if there is one; TRL's log). Raises Stopped when asked to stop; a checkpoint of
    the last step is then on disk."""
    trainer, steps = _trainer(ctx, model, renderer, numbers, phase)
    train_all(ctx, trainer, steps, len(phase.pairs), "curated pairs", "train")
    _restore_forward(model)
    return trainer.whole_model(), trainer.state.log_history


def _restore_forward(model: PreTrainedModel) -> None:
    """Take back what TRL and accelerate put in the place of `forward`: accelerate wraps a model once, so that the next phase's
    forward, which TRL sets anew, would run without autocast."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)


def _trainer(
    ctx: Context, model: PreTrainedModel, renderer: Renderer, numbers: Precision, phase: Phase
) -> tuple[PairTrainer, StepCallback]:
    config, pairs = ctx.config, phase.pairs
    seed = (seed_for(config.seed, ctx.round, "train") + phase.number) % 2**32
    set_seed(seed)  # the adapter's first weights
    disable_dropout(model)
    callback = StepCallback(ctx.progress, ctx.stop, len(pairs), phase.later)
    trainer = phase.trainer(
        model=model,
        args=_arguments(ctx, phase, numbers, seed),
        train_dataset=pairs.dataset(),
        processing_class=renderer.tokenizer,
        peft_config=adapter_config(config.train.lora, model) if config.train.method == "lora" else None,
        callbacks=[callback],
        train_config=config.train,
        identity=phase.identity,
        task_vector=task_vector_for(ctx, model),
        protected=phase.protected,
        sharded=numbers.sharded,
        active=phase.active,
        alpha=config.loss.alpha,
    )
    if isinstance(trainer.model, PeftModel):
        trainer.protected = protect_adapter(trainer.model, phase.protected)
    return trainer, callback


class _Arguments(DPOConfig):
    """DPOConfig of a model that is where it should be: one that will be cut need not fit a device."""

    @property
    def place_model_on_device(self) -> bool:
        return False


def _arguments(ctx: Context, phase: Phase, numbers: Precision, seed: int) -> DPOConfig:
    train, plan = ctx.config.train, phase.plan
    arguments = _Arguments(
        output_dir=str(phase.checkpoints),
        run_name=f"{ctx.config.name}-round-{ctx.round}",
        project=ctx.config.name,
        **common_arguments(train, plan, numbers, seed),
        loss_type=[ctx.config.loss.type],
        beta=ctx.config.loss.beta,
        label_smoothing=ctx.config.loss.smoothing,
        discopop_tau=ctx.config.loss.tau,
        precompute_ref_log_probs=True,
        disable_dropout=False,
    )
    # One device a process, whatever else is visible (tensor-parallel inference): no nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
