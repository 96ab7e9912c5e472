"""Plain AdamW, as both trainings have it unless something confines or merges its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters by name: matrices with weight decay, biases and norms without."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's AdamW over the trainable parameters; betas = (0.9, 0.999), eps = 1e-8 (torch's and TRL's defaults). The learning
    rate is the peak one: the trainer's schedule scales it. On CUDA fused: torch's other ways there take 4 bytes a parameter more for what they
    compute between, or step weights that are cut over processes one after another."""
    groups = decay_groups(model, weight_decay)
    on_cuda = all(parameter.is_cuda for group in groups for _, parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True if on_cuda else None)
