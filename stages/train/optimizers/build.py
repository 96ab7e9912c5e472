"""The optimizer of a run: the one place where a new one plugs in.

`PairTrainer.create_optimizer` calls `build_optimizer` with the model as the trainer holds it at that moment, so that a
model wrapped by FSDP hands over its sharded parameters.
"""

from __future__ import annotations

import torch
from torch import nn

from schemas.config.training import TrainConfig
from stages.train.adamw import adamw, decay_groups
from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.adamw import OnlineMergingAdamW
from stages.train.optimizers.settings import OFF, Merge
from stages.train.optimizers.subspace import Protected
from stages.train.optimizers.task_vector import TaskVector


def build_optimizer(
    model: nn.Module,
    config: TrainConfig,
    task_vector: TaskVector | None = None,
    seed: int = 0,
    protected: Protected | None = None,
    active: ActiveEntries | None = None,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, merged as `train.optimizer` says; weight decay only on matrices, not on
    biases and norms.

    The learning rate is the peak one: the trainer's schedule scales it. betas = (0.9, 0.999), eps = 1e-8 (torch's and
    TRL's defaults). seed: of the random masks. protected: what no update enters (`train.orthalign`). active: entries that are trained
    (`train.allo`).
    """
    radius = config.orthalign.trust_radius
    if config.optimizer == "adamw" and not protected and not radius and not active:
        return adamw(model, config.learning_rate, config.weight_decay)
    return OnlineMergingAdamW(
        decay_groups(model, config.weight_decay),
        lr=config.learning_rate,
        merge=merge_settings(config),
        task_vector=task_vector,
        protected=protected,
        active=active,
        factor_bytes=config.allo.factor_bytes,
        trust_radius=radius,
        seed=seed,
        telemetry_every=config.merge.log_every,
    )


def merge_settings(config: TrainConfig) -> Merge:
    """`train.optimizer` and `train.merge` with the defaults filled in."""
    facts = config.merge_facts
    if facts is None:
        return OFF
    merge = config.merge
    alpha = facts.alpha if merge.alpha is None else merge.alpha
    assert alpha is not None, "the config asks for it"
    return Merge(
        config.optimizer,
        alpha=alpha,
        reserve=facts.share if merge.reserve is None else merge.reserve,
        preset=merge.preset,
        every=merge.every,
        alpha_schedule=merge.alpha_schedule,
        rescale=merge.rescale,
    )
