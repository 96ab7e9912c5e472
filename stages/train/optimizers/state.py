"""An optimizer's state of sharded parameters as one of whole ones, and back: a checkpoint does not know how many processes wrote
it. Works for torch's AdamW as well."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from stages.train.optimizers.shard import LocalRows

_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "start", "displacement", "pending")
"""Entries of a parameter's state that have its shape."""


def gathered_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """state_dict with whole tensors on the CPU; without its tensors where not `keep` (processes that do not write).

    Collective when parameters are sharded. One tensor at a time is whole on a device.
    """
    found = optimizer.state_dict()
    state: dict[Any, dict[str, Any]] = {}
    for index, entries in found["state"].items():
        whole = {key: _whole(value, keep) for key, value in entries.items()}
        if keep:
            state[index] = whole
    return {**found, "state": state}


def scattered_state(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What `gathered_state` gave, cut to the rows this process holds of the optimizer's parameters."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    state: dict[Any, dict[str, Any]] = {}
    for index, param in zip(saved, params, strict=True):
        if index not in state_dict["state"]:
            continue
        shard = LocalRows.of(f"parameter {index}", param)
        state[index] = {
            key: shard.wrap(shard.take(value).to(param.device, copy=True)) if key in _SHAPED else value
            for key, value in state_dict["state"][index].items()
        }
    return {**state_dict, "state": state}


def _whole(value: Any, keep: bool) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if keep and isinstance(value, torch.Tensor) else value
