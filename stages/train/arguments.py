"""Arguments of transformers' Trainer that do not depend on the loss: the train and sft stages share them."""

from __future__ import annotations

from typing import Any

from schemas.config.trainer import TrainerConfig
from stages.train.batches import BatchPlan
from stages.train.model import Precision

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def common_arguments(section: TrainerConfig, plan: BatchPlan, numbers: Precision, seed: int) -> dict[str, Any]:
    """By name. Every step is logged, the last two checkpoints are kept, and nothing is truncated."""
    return {
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": _SCHEDULES[section.schedule],
        "warmup_steps": plan.warmup_steps,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "max_length": None,
        "router_aux_loss_coef": 0.0,  # none but the loss that is named
        "gradient_checkpointing": section.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if section.gradient_checkpointing else None,
        "bf16": numbers.bf16,
        "fp16": numbers.fp16,
        "use_cpu": numbers.device.type == "cpu",
        "dataloader_pin_memory": numbers.device.type == "cuda",
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": section.report_to or "none",
        "save_strategy": "steps",
        "save_steps": section.save_steps,
        "save_total_limit": 2,
    }
