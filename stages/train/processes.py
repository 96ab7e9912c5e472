"""What the processes that train together ask each other; each may be alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Stopped
from stages.models.device import device_of
from stages.train.peers import beating, peer_limit, wait_for_the_first

T = TypeVar("T")


def process_count(config: RunConfig) -> int:
    """Processes that `train.processes` asks for on this machine. Raises UserError when there are fewer GPUs."""
    wanted, device = config.train.processes, device_of(config)
    if device.type != "cuda":
        return wanted or 1
    there = torch.cuda.device_count()
    if wanted > there:
        raise UserError(
            f"train.processes is {wanted} and {there} GPU(s) are visible",
            where="train.processes",
            fix="One process trains on one GPU: lower it, or 0 for all GPUs there are.",
        )
    return wanted or there


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """Those of them on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process reports and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any of the processes: the same answer in all of them, which must all ask."""
    if world_size() == 1:
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def error_of_any(error: Exception | None) -> Exception | None:
    """What one of the processes met, the lowest, or nothing: the same answer in all of them, which must all ask."""
    if world_size() == 1:
        return error
    found: list[Exception | None] = [None] * world_size()
    dist.all_gather_object(found, error)
    return next(filter(None, found), None)


def from_first(compute: Callable[[], T], config: RunConfig) -> T:
    """What the first process computes, in all of them, which must all ask. Stopped, if it raises that, is raised in all; UserError when
    it is silent for longer than `execution.peer_minutes`."""
    if world_size() == 1:
        return compute()
    box: list[Any] = [None, False]
    if is_first():
        with beating():
            try:
                box[0] = compute()
            except Stopped:
                box[1] = True
    else:
        wait_for_the_first(peer_limit(config))
    dist.broadcast_object_list(box)
    if box[1]:
        raise Stopped
    result: T = box[0]
    return result


def at_first(compute: Callable[[], T], otherwise: T, config: RunConfig) -> T:
    """As `from_first`, but what it computes stays there: the others have `otherwise`."""
    kept = [otherwise]
    from_first(lambda: kept.__setitem__(0, compute()), config)
    return kept[0]


def weights_of_first(model: nn.Module) -> None:
    """Every process's weights become the first one's, in place. Collective."""
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)
