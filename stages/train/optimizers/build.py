"""The optimizer of a run: the one place where a new one plugs in.

`PairTrainer.create_optimizer` calls `build_optimizer` with the model as the trainer holds it at that moment, so that a
model wrapped by FSDP hands over its sharded parameters.
"""

from __future__ import annotations

import torch
from torch import nn

from schemas.config.training import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay only on matrices, not on biases and norms.

    The learning rate is the peak one: the trainer's schedule scales it. betas = (0.9, 0.999), eps = 1e-8 (torch's and
    TRL's defaults).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate)
