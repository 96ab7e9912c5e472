"""How pairs become optimizer steps: accumulation and step counts, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from schemas.config.training import TrainConfig
from schemas.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """micro_batch * accumulation * devices = pairs per step; steps: optimizer steps of the run; notes: for people."""

    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    notes: tuple[str, ...] = ()


def plan_batches(n_pairs: int, config: TrainConfig, devices: int = 1) -> BatchPlan:
    """Plan the steps over `n_pairs` pairs.

    An epoch has ceil(n_pairs / batch_size) steps; the last one takes what is left, every pair weighing the same inside
    its step. `max_steps` is an upper bound on `epochs`, never an extension. A batch larger than the data is said aloud:
    each step then uses all pairs. Raises UserError when batch_size is not a multiple of micro_batch_size * devices, and when
    the run is shorter than `merge.every`.
    """
    if config.max_steps == 0:
        raise UserError(
            "train.max_steps is 0: nothing would be trained",
            where="train.max_steps",
            fix="Use -1 to train by epochs, or give a positive number of steps.",
        )
    notes = []
    micro = config.micro_batch_size
    if devices > config.batch_size:
        raise UserError(
            f"train.batch_size {config.batch_size} is smaller than the {devices} processes that train together",
            where="train.batch_size, train.processes",
            fix="Raise the one or lower the other: each process takes part in every step.",
        )
    if micro > config.batch_size // devices:
        micro = config.batch_size // devices
        per = f" / {devices} processes" if devices > 1 else ""
        notes.append(f"train.micro_batch_size reduced to train.batch_size{per} ({micro})")
    if config.batch_size % (micro * devices):
        raise UserError(
            f"train.batch_size {config.batch_size} is not a multiple of train.micro_batch_size {micro}"
            f" times {devices} process(es)",
            where="train.batch_size, train.micro_batch_size, train.processes",
            fix="Change one of them: micro_batch_size alters speed and memory only.",
        )
    if config.batch_size > n_pairs:
        notes.append(
            f"train.batch_size {config.batch_size} is larger than the {n_pairs} curated pairs: each step uses them all"
        )
    steps_per_epoch = math.ceil(n_pairs / config.batch_size)
    steps = math.ceil(config.epochs * steps_per_epoch)
    if 0 < config.max_steps < steps:
        steps = config.max_steps
    every = config.merge.every
    if every > steps:
        raise UserError(
            f"train.merge.every is {every} and the run has {steps} steps: nothing would be merged",
            where="train.merge.every",
            fix="Lower it, or train longer.",
        )
    if steps % every:
        notes.append(f"the last {steps % every} of {steps} steps end inside a window of train.merge.every: not merged")
    return BatchPlan(
        micro_batch=micro,
        accumulation=config.batch_size // (micro * devices),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=int(config.warmup_ratio * steps),
        notes=tuple(notes),
    )
